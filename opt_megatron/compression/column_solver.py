"""The elimination that GPTQ and SparseGPT share: column by column, what a column loses is made up for by later ones.

With A = (2 / n) sum x x^T over the inputs and C the upper Cholesky factor of A's inverse (C^T C = A^-1), replacing the
column w_j by q_j leaves the least error if e_j = (w_j - q_j) / C_jj times C_jk is taken from every later column k
(Frantar et al. 2022, arXiv 2210.17323, section 3.3). Columns are treated in blocks of 128: within a block at once,
beyond it by one product a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .recipe import BLOCK_COLUMNS

_CHUNK = 2**20  # numbers that are reversed at once
_INVERTED_COLUMNS = 512
_PERMUTED_ROWS = 256


class ColumnRule(Protocol):
    """What becomes of each column. Matrices are transposed here: [columns, O]."""

    def begin_block(self, columns: Tensor, block: Tensor, first: int, diagonal: Tensor) -> None:
        """Called before the columns of a block.

        Args:
            columns: the whole matrix [I, O]; its part of this block stays as it is until the block ends.
            block: a copy of that part [128, O], which is updated column by column.
            first: number of the block's first column.
            diagonal: C_jj of the block's columns, [128].
        """

    def replace(self, block: Tensor, index: int) -> Tensor:
        """What replaces the block's column `index`, [O]; columns before it have been replaced."""


class NotPositiveDefiniteError(UserError):
    """The second moments of the inputs cannot be factored."""


@dataclass(frozen=True)
class Curvature:
    """What the second moments A = (2 / n) sum x x^T of a layer's inputs say about its columns.

    Attributes:
        factor: C, upper triangular [I, I] with C^T C = A^-1, of the columns in their order.
        dead: bool [I], inputs that are always zero, in their original places.
        order: int64 [I], the original place of each column; None: they stay in their places.
    """

    factor: Tensor
    dead: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, hessian: Tensor, damping: float, *, largest_first: bool = False) -> Curvature:
        """Factor a Hessian.

        Args:
            hessian: A [I, I], symmetric and contiguous; overwritten.
            damping: this share of A's mean diagonal is added to its diagonal.
            largest_first: columns in the order of A_jj, the largest first (GPTQ's act-order).

        Raises:
            NotPositiveDefiniteError: it has no such factor.
        """
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        order = None
        if largest_first:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order]
            for rows in hessian.split(_PERMUTED_ROWS):
                rows.copy_(rows[:, order])
        return cls(upper_factor(hessian, damping), dead, order)


def upper_factor(hessian: Tensor, damping: float) -> Tensor:
    """C, upper triangular [I, I], of A with `damping` times its mean diagonal added to the diagonal.

    A is factored as U U^T with an upper U, and C is U's inverse: C^T C = A^-1. All is done in the memory of A, which
    may be larger than the layer: in opt-175b's fc2, 19 GB in float64.

    Args:
        hessian: A [I, I], symmetric and contiguous; overwritten.

    Raises:
        NotPositiveDefiniteError: it has no such factor.
    """
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    _reverse(hessian)  # the lower factor of the matrix with both orders reversed is U reversed
    by_columns, info = hessian.mT, torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(by_columns, out=(by_columns, info))
    if int(info):
        raise NotPositiveDefiniteError(
            f"the second moments of the inputs are not positive definite with a damping of {damping:g}: raise it, or "
            "give more calibration samples"
        )
    _reverse(hessian)
    _invert_upper(by_columns)
    return by_columns


def _reverse(matrix: Tensor) -> None:
    """Reverse the order of rows and of columns in place, a chunk of numbers at a time."""
    flat = matrix.view(-1)
    half = flat.numel() // 2
    for first in range(0, half, _CHUNK):
        stop = min(first + _CHUNK, half)
        front, back = flat[first:stop], flat[flat.numel() - stop : flat.numel() - first]
        reversed_front = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(reversed_front)


def _invert_upper(upper: Tensor) -> None:
    """Replace an upper triangular matrix by its inverse.

    A block of columns of the inverse depends on the same and earlier ones of the matrix alone, so the last block comes
    first. Within it, the last rows come first.
    """
    starts = range(0, len(upper), _INVERTED_COLUMNS)
    for first in reversed(starts):
        stop = min(first + _INVERTED_COLUMNS, len(upper))
        unit = torch.eye(stop - first, dtype=upper.dtype, device=upper.device)
        inverse = torch.empty(stop, stop - first, dtype=upper.dtype, device=upper.device)
        inverse[first:] = torch.linalg.solve_triangular(upper[first:stop, first:stop], unit, upper=True)
        for row in reversed(range(0, first, _INVERTED_COLUMNS)):
            end = row + _INVERTED_COLUMNS
            product = upper[row:end, end:stop] @ inverse[end:]
            inverse[row:end] = torch.linalg.solve_triangular(upper[row:end, row:end], product.neg_(), upper=True)
        upper[:stop, first:stop] = inverse


def solve_columns(columns: Tensor, factor: Tensor, rule: ColumnRule) -> float:
    """Replace the columns of a matrix by what the rule makes of them, in place, each making up for those before it.

    Args:
        columns: W^T [I, O], contiguous.
        factor: C [I, I] of `upper_factor`.

    Returns:
        the sum of (w_j - q_j)^2 / C_jj^2 / 2 over all weights, as GPTQ's program reports it.
    """
    loss = torch.zeros((), dtype=torch.float64, device=columns.device)
    for first in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(first + BLOCK_COLUMNS, len(columns))
        block, own_rows = columns[first:stop].clone(), factor[first:stop, first:].to(columns.dtype)
        local, later = own_rows[:, : stop - first], own_rows[:, stop - first :]
        diagonal = local.diagonal()
        rule.begin_block(columns, block, first, diagonal)
        errors = torch.empty_like(block)
        for index in range(stop - first):
            replaced = rule.replace(block, index)
            torch.sub(block[index], replaced, out=errors[index]).div_(diagonal[index])
            block[index + 1 :].addr_(local[index, index + 1 :], errors[index], alpha=-1)
            block[index] = replaced
        columns[first:stop] = block
        columns[stop:].addmm_(later.t(), errors, alpha=-1)
        loss += errors.square().sum(dtype=torch.float64)
    return float(loss) / 2
