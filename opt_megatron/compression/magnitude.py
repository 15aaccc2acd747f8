"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from torch import Tensor

from .masks import SumOverRanks, smallest_of_groups, smallest_of_matrix
from .recipe import Prune


def magnitude_mask(weight: Tensor, prune: Prune, sum_over_ranks: SumOverRanks) -> Tensor:
    """True for the weights [O, I] that become zero: the smallest of the whole matrix, or of every group of a pattern.

    Args:
        weight: float32, this rank's rows.
        sum_over_ranks: over the ranks that hold the other rows.
    """
    if prune.zeros_in_group is not None:
        return smallest_of_groups(weight.abs(), *prune.zeros_in_group)
    assert prune.sparsity is not None
    return smallest_of_matrix(weight.abs(), prune.sparsity, sum_over_ranks)
