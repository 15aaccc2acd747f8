"""Outlier channels before weights and activations are rounded with their neighbours, from the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 8  # times the median


def equalize_columns(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divide columns that are far smaller or larger than the others by factors, by which their inputs are multiplied.

    A model from 6.7b on has channels with activations of 100 times the others', and columns to match. Rounded with its
    row, such a column has a step or two of its own; rounded with its group, such an activation leaves the others none.
    The product of both is of ordinary size, and so are the two after this.

    Returns:
        The weight [O, I], and the factors [I] in float32; None if no column is far from the median.
    """
    largest = weight.abs().amax(0).float()
    factors = largest / largest.median().clamp(min=1e-12)
    is_ordinary = (factors == 0) | ((factors > 1 / _FAR) & (factors < _FAR))
    if is_ordinary.all():
        return weight, None
    factors = torch.where(is_ordinary, 1.0, factors)
    return (weight.float() / factors).to(weight.dtype), factors


def multiplied(x: Tensor, factors: Tensor | None) -> Tensor:
    """Activations [T, I] times the factors of `equalize_columns`."""
    return x if factors is None else (x * factors).to(x.dtype)
