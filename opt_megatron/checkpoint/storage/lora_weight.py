"""A weight with LoRA's factors added to it as it is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import CheckpointError
from .blocks import Block, whole
from .lazy_tensor import LazyTensor


@dataclass(frozen=True)
class LoRAFactors:
    """The factors of one weight's update, scale B A: `a` [rank, in] and `b` [out, rank]."""

    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[0]


class LoRAWeight(LazyTensor):
    """weight + scale B A, computed for the blocks that are read.

    Args:
        weight: [out, in].

    Raises:
        CheckpointError: the shapes do not fit each other.
    """

    def __init__(self, weight: LazyTensor, factors: LoRAFactors) -> None:
        super().__init__(weight.shape, weight.dtype)
        self._weight, self._factors = weight, factors
        a, b = factors.a, factors.b
        if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"LoRA's factors of {list(a.shape)} and {list(b.shape)} do not fit a weight of {list(weight.shape)}"
            )

    def read(self, block: Block) -> Tensor:
        """A new tensor in float32: a model in float32 loses nothing to the dtype that the weight is stored in."""
        a = self._factors.a.read((whole(self._factors.a.shape)[0], block[1])).float()
        b = self._factors.b.read((block[0], whole(self._factors.b.shape)[1])).float()
        return self._weight.read(block).float() + self._factors.scale * (b @ a)
