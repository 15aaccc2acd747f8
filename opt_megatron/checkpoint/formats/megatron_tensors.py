"""One Megatron tensor and the canonical tensors that it is made of: q, k and v, interleaved head by head, or one."""

from __future__ import annotations

import math

from torch import Tensor

from ..output_files import DtypeOf, SourceBlock, StoredTensor
from ..parameter_mapping import ParameterMapping, component_view, rank_block
from ..storage.blocks import Block, block_shape
from ..storage.lazy_tensor import LazyTensor, RemappedTensor


def qkv_component(fused: LazyTensor, index: int, count: int, head_dim: int) -> LazyTensor:
    """Component number `index` of `count` (q, k or v) of a tensor that holds them head by head."""
    if fused.shape[0] % (count * head_dim):
        return fused  # left to Checkpoint.check_tensors, which names the tensor: its rows cannot be whole heads
    return _QKVComponent(fused, index, count, head_dim)


class _QKVComponent(RemappedTensor):
    """q, k or v of `linear_qkv`."""

    def __init__(self, fused: LazyTensor, index: int, count: int, head_dim: int) -> None:
        super().__init__(fused, (fused.shape[0] // count, *fused.shape[1:]))
        self._index, self._count, self._head_dim = index, count, head_dim

    def _remap(self, block: Block) -> Block:
        first, stop = self._heads(block)
        per_head = self._count * self._head_dim
        return (slice(first * per_head, stop * per_head), *block[1:])

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        rows = component_view(values, self._index, self._count, self._head_dim).flatten(0, 1)
        skipped = block[0].start - self._heads(block)[0] * self._head_dim
        return rows[skipped : skipped + block[0].stop - block[0].start]

    def _heads(self, block: Block) -> tuple[int, int]:
        """The heads that hold the block's rows."""
        return block[0].start // self._head_dim, -(-block[0].stop // self._head_dim)


def stored_tensor(
    parameter: ParameterMapping,
    shapes: dict[str, tuple[int, ...]],
    head_dim: int,
    dtype_of: DtypeOf,
    rank: int,
    ranks: int,
) -> StoredTensor:
    """What tensor parallel rank `rank` of `ranks` stores of a parameter.

    Args:
        shapes: of the canonical tensors.
    """
    blocks = [rank_block(shapes[name], parameter.split, rank, ranks) for name in parameter.canonical]
    dtype = dtype_of(parameter.canonical[0])
    if len(blocks) == 1:
        stored = StoredTensor.of_block(parameter.megatron, parameter.canonical[0], blocks[0], dtype)
        first = rank_block(shapes[parameter.canonical[0]], parameter.split, 0, ranks)
        return stored.with_rows(block_shape(first)[0])  # Megatron-LM pads the vocabulary
    rows, *columns = block_shape(blocks[0])
    head_size = head_dim * math.prod(columns)
    interleaved = tuple(
        SourceBlock(name, _head_of(block, head, head_dim), (head * len(blocks) + index) * head_size)
        for head in range(rows // head_dim)
        for index, (name, block) in enumerate(zip(parameter.canonical, blocks, strict=True))
    )
    return StoredTensor(parameter.megatron, (rows * len(blocks), *columns), dtype, interleaved)


def _head_of(block: Block, head: int, head_dim: int) -> Block:
    start = block[0].start + head * head_dim
    return (slice(start, start + head_dim), *block[1:])
