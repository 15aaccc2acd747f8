"""One Megatron rank's parameters, cut out of canonical tensors: what loading and conversion share."""

from __future__ import annotations

from torch import Tensor

from .table import Parameter, part_view
from .view import Checkpoint, rank_block


def rank_shape(checkpoint: Checkpoint, parameter: Parameter, ranks: int) -> tuple[int, ...]:
    """Shape of a Megatron parameter on one of `ranks` tensor parallel ranks."""
    shape = list(checkpoint.tensors[parameter.canonical[0]].shape)
    if parameter.split.value is not None:
        shape[parameter.split.value] //= ranks
    shape[0] *= len(parameter.canonical)
    return tuple(shape)


def fill(target: Tensor, checkpoint: Checkpoint, parameter: Parameter, rank: int, ranks: int) -> None:
    """Read into `target` the part of a parameter that belongs to tensor parallel rank `rank` of `ranks`.

    Only that part's bytes are read. The values are cast to the target's dtype and moved to its device.
    """
    parts = len(parameter.canonical)
    for part, name in enumerate(parameter.canonical):
        block = rank_block(checkpoint.tensors[name].shape, parameter.split, rank, ranks)
        view = part_view(target, part, parts, checkpoint.config.head_dim)
        view.copy_(checkpoint.read(name, block).reshape(view.shape))
        checkpoint.tensors[name].release()
