"""A tensor after the steps of a run, which are repeated on the blocks that are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parameter_mapping import row_pieces
from ..storage.blocks import Block
from ..storage.lazy_tensor import LazyTensor
from .normal_numbers import normal_block, piece_elements
from .steps import MezoStep, repeat_step


class TrainedTensor(LazyTensor):
    """The tensor `name` of a run that began with `first`.

    Args:
        dtype: that the run's parameters have.
    """

    def __init__(
        self, name: str, first: LazyTensor, dtype: torch.dtype, steps: Sequence[MezoStep], epsilon: float
    ) -> None:
        super().__init__(first.shape, dtype)
        self._name, self._first, self._steps, self._epsilon = name, first, steps, epsilon

    def read(self, block: Block) -> Tensor:
        """A new tensor."""
        values = self._first.read(block).to(self.dtype, copy=True)
        repeat_steps(values, self._name, block, self._steps, self._epsilon)
        return values


def repeat_steps(values: Tensor, name: str, block: Block, steps: Sequence[MezoStep], epsilon: float) -> None:
    """Make steps again on the block `values` of the tensor `name`.

    Args:
        values: in the shape of the block or, for q, k or v, [heads, d, ...] (`component_view`); changed.
    """
    most = piece_elements(values.device)
    for part, part_block in row_pieces(values, block, most):
        at_once = max(1, most // max(1, part.numel()))
        for start in range(0, len(steps), at_once):
            some = steps[start : start + at_once]
            numbers = normal_block([step.seed for step in some], name, part_block, values.device)
            for step, normal in zip(some, numbers, strict=True):
                repeat_step(part, normal.reshape(part.shape), epsilon, step)
