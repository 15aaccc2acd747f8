"""A matrix that is stored as small numbers with scales and zeros for groups of inputs, as GPTQ's programs write it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError
from .blocks import Block, whole
from .lazy_tensor import LazyTensor
from .packed_bits import PER_STREAM, unpack_bits


class GroupedNumbers(NamedTuple):
    """A block of a matrix [O, I]: (number - zero of its group) * scale of its group. G groups of the whole matrix.

    Attributes:
        numbers: uint8 [O, I]
        scales: float32 [O, G]
        zeros: uint8 [O, G]
        group_of: int64 [I], the group of every input.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    def values(self) -> Tensor:
        """float32 [O, I]"""
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of]
        return (self.numbers.float() - zeros.float()) * scales


class QuantizedTensor(LazyTensor):
    """The values of a quantised matrix in float32, or its numbers.

    Args:
        qweight: int32 [I * bits / 32, O]
        qzeros: int32 [G, O * bits / 32], of zeros less `zero_offset`.
        scales: [G, O]
        g_idx: int32 [I], the group of every input.
        zero_offset: that is added to the stored zeros: 1 in GPTQ's first layout, 0 in its second.

    Raises:
        CheckpointError: their shapes do not belong together, or an input is of no group.
    """

    def __init__(
        self,
        qweight: LazyTensor,
        qzeros: LazyTensor,
        scales: LazyTensor,
        g_idx: LazyTensor,
        bits: int,
        zero_offset: int,
    ) -> None:
        num_groups, num_outputs = scales.shape
        num_inputs = g_idx.shape[0]
        super().__init__((num_outputs, num_inputs), torch.float32)
        wanted = (num_inputs * bits // 32, num_outputs), (num_groups, num_outputs * bits // 32)
        if (qweight.shape, qzeros.shape) != wanted or num_inputs % PER_STREAM or num_outputs % PER_STREAM:
            raise CheckpointError(
                f"a matrix of {bits} bits, {num_inputs} inputs and {num_outputs} outputs has qweight "
                f"{list(qweight.shape)} and qzeros {list(qzeros.shape)}, which do not belong together"
            )
        self._qweight, self._qzeros, self._scales = qweight, qzeros, scales
        self.bits, self._zero_offset = bits, zero_offset
        self.group_of = g_idx.read(whole(g_idx.shape)).long()
        if not 0 <= int(self.group_of.min()) <= int(self.group_of.max()) < num_groups:
            raise CheckpointError(f"an input is of group {int(self.group_of.max())}, and there are {num_groups}")

    @property
    def num_bytes(self) -> int:
        """Size of what is stored."""
        return self._qweight.num_bytes + self._qzeros.num_bytes + self._scales.num_bytes

    def read(self, block: Block) -> Tensor:
        """The values, a new tensor in float32."""
        return self.read_numbers(block).values()

    def read_numbers(self, block: Block) -> GroupedNumbers:
        """The numbers of a block, with scales and zeros of all groups."""
        rows, columns = block
        inputs, offset = _aligned(columns)
        words = slice(inputs.start * self.bits // 32, inputs.stop * self.bits // 32)
        numbers = unpack_bits(self._qweight.read((words, rows)), self.bits).t()
        outputs, first = _aligned(rows)
        words = slice(outputs.start * self.bits // 32, outputs.stop * self.bits // 32)
        groups = slice(0, self._qzeros.shape[0])
        zeros = unpack_bits(self._qzeros.read((groups, words)).t().contiguous(), self.bits)
        zeros = (zeros[first : first + rows.stop - rows.start] + self._zero_offset) & (2**self.bits - 1)
        scales = self._scales.read((groups, rows)).t().float()
        own = numbers[:, offset : offset + columns.stop - columns.start]
        return GroupedNumbers(own.contiguous(), scales.contiguous(), zeros, self.group_of[columns])

    def group_size(self) -> int | None:
        """The inputs that share a scale if all groups have as many neighbouring ones (the last may have fewer)."""
        size = int((self.group_of == 0).sum())
        expected = torch.arange(len(self.group_of)) // max(1, size)
        return size if size and torch.equal(self.group_of, expected) else None


def _aligned(part: slice) -> tuple[slice, int]:
    """The whole streams of numbers that cover a part, and where in them it begins."""
    start, stop = part.start // PER_STREAM * PER_STREAM, -(-part.stop // PER_STREAM) * PER_STREAM
    return slice(start, stop), part.start - start
