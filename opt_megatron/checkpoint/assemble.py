"""One Megatron rank's parameters, cut out of canonical tensors: what loading and conversion share."""

from __future__ import annotations

from torch import Tensor

from .table import Parameter, part_view, rank_block
from .view import Checkpoint


def fill(target: Tensor, checkpoint: Checkpoint, parameter: Parameter, rank: int, ranks: int) -> None:
    """Read into `target` the part of a parameter that belongs to tensor parallel rank `rank` of `ranks`.

    Only that part's bytes are read. The values are cast to the target's dtype and moved to its device.
    """
    parts = len(parameter.canonical)
    for part, name in enumerate(parameter.canonical):
        block = rank_block(checkpoint.tensors[name].shape, parameter.split, rank, ranks)
        view = part_view(target, part, parts, checkpoint.config.head_dim)
        view.copy_(checkpoint.read(name, block).reshape(view.shape))
        checkpoint.release(name, block)
