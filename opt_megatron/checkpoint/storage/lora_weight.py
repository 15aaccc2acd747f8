"""A weight with LoRA's factors added to it as it is read."""

from __future__ import annotations

from torch import Tensor

from ...errors import CheckpointError
from .blocks import Block
from .lazy_tensor import LazyTensor


class LoRAWeight(LazyTensor):
    """weight + scale B A, computed for the blocks that are read.

    Args:
        weight: [out, in]. a: [rank, in]. b: [out, rank].

    Raises:
        CheckpointError: the shapes do not fit each other.
    """

    def __init__(self, weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> None:
        super().__init__(weight.shape, weight.dtype)
        self._weight, self._a, self._b, self._scale = weight, a, b, scale
        if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"LoRA's factors of {list(a.shape)} and {list(b.shape)} do not fit a weight of {list(weight.shape)}"
            )

    def read(self, block: Block) -> Tensor:
        """A new tensor, computed in float32 and cast to the weight's dtype."""
        a = self._a.read((slice(0, self._a.shape[0]), block[1])).float()
        b = self._b.read((block[0], slice(0, self._b.shape[1]))).float()
        weight = self._weight.read(block)
        return (weight.float() + self._scale * (b @ a)).to(weight.dtype)
