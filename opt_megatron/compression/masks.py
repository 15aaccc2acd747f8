"""Which entries are the smallest: of a whole matrix whatever its division among ranks, of a row, of n in every m."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The sum over the ranks that hold rows of one matrix, of a tensor that may be overwritten.
SumOverRanks = Callable[[Tensor], Tensor]


def kth_smallest(scores: Tensor, k: int, sum_over_ranks: SumOverRanks) -> float:
    """The value at index `k`, from 0, of all ranks' scores in their order; called on all of these ranks.

    The bits of floats that are not negative are in the order of their values, so 31 counts find the exact value,
    and nothing is gathered.

    Args:
        scores: float32, not negative, of any shape.
        k: below the number of all ranks' scores.
    """
    bits = scores.contiguous().view(torch.int32)
    low, high = 0, 0x7F800000  # infinity
    while low < high:
        middle = (low + high) // 2
        count = sum_over_ranks((bits <= middle).sum(dtype=torch.int64).reshape(1))
        if int(count) > k:
            high = middle
        else:
            low = middle + 1
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


def smallest_of_matrix(scores: Tensor, sparsity: float, sum_over_ranks: SumOverRanks) -> Tensor:
    """True for the entries [O, I] up to the one at index int(size * sparsity); more than that share only by ties.

    Args:
        scores: float32, not negative; this rank's rows.
    """
    size = int(sum_over_ranks(torch.tensor([scores.numel()], device=scores.device)))
    return scores <= kth_smallest(scores, int(size * sparsity), sum_over_ranks)


def smallest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    """True for the int(I * sparsity) smallest of every row [O, I]; of equal ones the first."""
    count = int(scores.size(1) * sparsity)
    first = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, first, True)


def smallest_of_groups(scores: Tensor, zeros: int, group: int) -> Tensor:
    """True for the `zeros` smallest of every `group` neighbouring columns of each row [O, I]; of equal ones the first.

    Args:
        group: divides I.
    """
    groups = scores.unflatten(1, (-1, group))
    first = groups.sort(dim=2, stable=True).indices[..., :zeros]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, first, True).flatten(1)
