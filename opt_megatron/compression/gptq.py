"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights are rounded column by column, later ones making up for it.

As in the authors' program (IST-DASLab/gptq): the grids come from the weights before dead inputs are taken out, and
those of groups from the weights as they were before the current block of 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .column_solver import Curvature, solve_columns
from .grid import Grid, GroupedGrids, columns_per_group
from .recipe import WHOLE_ROW, Quantize


@dataclass(frozen=True)
class Solved:
    """What an elimination made of a matrix.

    Attributes:
        weight: [O, I]
        error: as `solve_columns` returns it, of this rank's rows; None where nothing was eliminated.
        grids: of quantised weights.
    """

    weight: Tensor
    error: float | None
    grids: GroupedGrids | None = None


def gptq(weight: Tensor, curvature: Curvature, quantize: Quantize, zeros: Tensor | None = None) -> Solved:
    """Round a matrix.

    Args:
        weight: float32 [O, I], any rows of a matrix.
        curvature: of its inputs; in another order of columns for act-order.
        zeros: bool [O, I], weights that an earlier step has pruned; they stay zero.
    """
    order = curvature.order
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    rule = RoundColumns(columns, quantize, curvature)
    columns[curvature.dead] = 0
    if zeros is not None:
        rule.zeros = zeros.t() if order is None else zeros.t()[order]
    columns = columns if order is None else columns[order]
    error = solve_columns(columns, curvature.factor, rule)
    columns = columns if order is None else columns[order.argsort()]
    return Solved(columns.t().contiguous(), error, rule.grids())


class RoundColumns:
    """The rule that rounds every column to the grid of its group.

    Args:
        columns: W^T [I, O], before dead inputs are taken out.
        curvature: which inputs are dead, and the order of the columns.

    Attributes:
        zeros: bool [I, O] in the order of the columns, weights that stay zero; None: there are none.
    """

    def __init__(self, columns: Tensor, quantize: Quantize, curvature: Curvature) -> None:
        self._quantize, self._order = quantize, curvature.order
        self._size = columns_per_group(quantize, len(columns))
        self._num_inputs = len(columns)
        self._grids: list[Grid] = []
        self.zeros: Tensor | None = None
        if quantize.group_size == WHOLE_ROW:
            self._grids = [self._grid(columns)]
        elif quantize.static_groups:
            alive = columns.masked_fill(curvature.dead[:, None], 0)
            self._grids = [self._grid(group) for group in alive.split(self._size)]
        self._is_dynamic = not self._grids

    def begin_block(self, columns: Tensor, block: Tensor, first: int, diagonal: Tensor) -> None:
        """See ColumnRule."""
        self._columns, self._first = columns, first

    def replace(self, block: Tensor, index: int) -> Tensor:
        """See ColumnRule."""
        column = block[index]
        if self.zeros is not None:
            column = column.masked_fill(self.zeros[self._first + index], 0)
        return self.round(column, index)

    def round(self, column: Tensor, index: int) -> Tensor:
        """The nearest values [O] for a column that is the block's column `index`, a new tensor."""
        number = self._first + index
        if self._is_dynamic and number % self._size == 0:
            self._grids.append(self._grid(self._columns[number : number + self._size]))
        if self._order is not None and not self._is_dynamic:
            number = int(self._order[number])
        return self._grids[number // self._size].round(column[:, None])[:, 0]

    def grids(self) -> GroupedGrids:
        """The grids of all groups, and the group of every column in its original place."""
        group_of = torch.arange(self._num_inputs, device=self._grids[0].scale.device) // self._size
        if self._is_dynamic and self._order is not None:
            group_of = group_of[self._order.argsort()]
        return GroupedGrids.join(self._grids, group_of, self._quantize.bits)

    def _grid(self, columns: Tensor) -> Grid:
        return Grid.covering(columns.t(), self._quantize.bits, symmetric=self._quantize.symmetric)
