"""Loads 4-bit weights as a checkpoint holds them: each rank reads the numbers of its slices, and no float weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..model.linear_methods.base import LinearMethod
from ..model.linear_methods.int4_groups import Int4Method, Int4Weight
from .checkpoint import Checkpoint
from .parameter_mapping import ParameterMapping, block_view, rank_block
from .storage.quantized_tensor import QuantizedTensor

_BITS = 4


def holds_numbers(checkpoint: Checkpoint, parameter: ParameterMapping, method: type[LinearMethod]) -> bool:
    """Whether the checkpoint holds a parameter as numbers that a linear method keeps as they are.

    Those of other bits, and of columns that are not in the order of their groups (act-order), are read as floats.

    Raises:
        UserError: the numbers have groups of another size.
    """
    tensors = [checkpoint.tensors[name] for name in parameter.canonical]
    if not issubclass(method, Int4Method):
        return False
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor) and tensor.bits == _BITS]
    sizes = {tensor.group_size() for tensor in quantized}
    if len(quantized) < len(tensors) or None in sizes:
        return False
    smaller = [size for size in sizes if size is not None and size % method.group_size]
    if smaller:
        raise UserError(
            f"{checkpoint.path}: its 4-bit weights have groups of {smaller[0]} inputs, which groups of "
            f"{method.group_size} do not divide: give another --group-size with --quantization int4, or none of both"
        )
    return True


def read_numbers(
    like: Tensor,
    checkpoint: Checkpoint,
    parameter: ParameterMapping,
    rank: int,
    ranks: int,
    group_size: int,
    device: torch.device,
) -> Int4Weight:
    """The numbers of what tensor parallel rank `rank` of `ranks` holds of a parameter.

    Args:
        like: has the shape of the rank's part.
        group_size: of the result; groups of the checkpoint may have several times as many inputs.

    Raises:
        CheckpointError: they cannot be read.
        UserError: the ranks' columns do not begin with groups.
    """
    weight: Int4Weight | None = None
    count = len(parameter.canonical)
    for index, name in enumerate(parameter.canonical):
        tensor = checkpoint.tensors[name]
        assert isinstance(tensor, QuantizedTensor)
        block = rank_block(tensor.shape, parameter.split, rank, ranks)
        part = tensor.read_numbers(block)
        if part.numbers.shape[1] % group_size:
            raise UserError(
                f"{name}: its {tensor.shape[1]} inputs in groups of {group_size} do not divide by {ranks} tensor "
                "parallel ranks: use fewer, or a smaller --group-size"
            )
        groups = part.group_of[::group_size]
        parts = part.numbers, part.scales[:, groups], part.zeros[:, groups]
        if weight is None:
            weight = Int4Weight(*(p.new_empty((like.shape[0], p.shape[1]), device=device) for p in parts))
        for whole, values in zip(weight, parts, strict=True):
            view = block_view(whole, index, count, checkpoint.config.head_dim, block)
            view.copy_(values.reshape(view.shape))
    assert weight is not None
    return weight
