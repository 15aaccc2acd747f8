"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): weights are pruned, and rounded, with later ones making up.

As in the authors' program (IST-DASLab/sparsegpt): scores come from the updated weights, a share is chosen for each
block of 128 columns over all rows, and what stays is rounded in the same elimination where quantisation follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .column_solver import Curvature, solve_columns
from .gptq import RoundColumns, Solved
from .masks import SumOverRanks, smallest_of_groups, smallest_of_matrix
from .recipe import Prune, Quantize


def sparsegpt(
    weight: Tensor,
    curvature: Curvature,
    prune: Prune,
    sum_over_ranks: SumOverRanks,
    quantize: Quantize | None = None,
) -> Solved:
    """Prune a matrix; called on all ranks that hold rows of it.

    Args:
        weight: float32 [O, I], this rank's rows.
        curvature: of its inputs, the columns in their places.
        sum_over_ranks: over the ranks that hold the other rows.
        quantize: round what stays on this grid, too.
    """
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    rounding = None if quantize is None else RoundColumns(columns, quantize, curvature)
    columns[curvature.dead] = 0
    rule = _PruneColumns(prune, sum_over_ranks, rounding)
    error = solve_columns(columns, curvature.factor, rule)
    grids = None if rounding is None else rounding.grids()
    return Solved(columns.t().contiguous(), error, grids)


class _PruneColumns:
    """The rule that replaces weights with small w^2 / C_jj^2 by zero, and rounds the others if there is a grid."""

    def __init__(self, prune: Prune, sum_over_ranks: SumOverRanks, rounding: RoundColumns | None) -> None:
        self._prune, self._sum_over_ranks, self._rounding = prune, sum_over_ranks, rounding

    def begin_block(self, columns: Tensor, block: Tensor, first: int, diagonal: Tensor) -> None:
        """See ColumnRule."""
        self._diagonal = diagonal
        self._mask = torch.zeros_like(block, dtype=torch.bool)
        if self._prune.sparsity is not None:
            scores = self._scores(block, slice(None))
            self._mask = smallest_of_matrix(scores, self._prune.sparsity, self._sum_over_ranks)
        if self._rounding is not None:
            self._rounding.begin_block(columns, block, first, diagonal)

    def replace(self, block: Tensor, index: int) -> Tensor:
        """See ColumnRule."""
        if self._prune.zeros_in_group is not None and index % self._prune.zeros_in_group[1] == 0:
            group = slice(index, index + self._prune.zeros_in_group[1])
            scores = self._scores(block, group).t()
            self._mask[group] = smallest_of_groups(scores, *self._prune.zeros_in_group).t()
        column = block[index].masked_fill(self._mask[index], 0)
        return column if self._rounding is None else self._rounding.round(column, index)

    def _scores(self, block: Tensor, part: slice) -> Tensor:
        return block[part].square() / self._diagonal[part, None].square()
