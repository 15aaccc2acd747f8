"""Wanda (Sun et al. 2023, arXiv 2306.11695): weights whose products with their inputs are small become zero."""

from __future__ import annotations

from torch import Tensor

from .masks import smallest_of_groups, smallest_of_rows
from .recipe import Prune


def wanda_mask(weight: Tensor, squared_norms: Tensor, prune: Prune) -> Tensor:
    """True for the weights that become zero: the smallest |W_ij| * sqrt(c_j) of every row, or of every group in it.

    Args:
        weight: [O, I]
        squared_norms: c, [I], the squared 2-norm of every input over the calibration tokens.
    """
    scores = weight.abs() * squared_norms.to(weight.dtype).sqrt()
    if prune.zeros_in_group is not None:
        return smallest_of_groups(scores, *prune.zeros_in_group)
    assert prune.sparsity is not None
    return smallest_of_rows(scores, prune.sparsity)
