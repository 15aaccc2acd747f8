"""Symmetric 8-bit quantisation by row, which the int8 methods and their embedding share."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ...errors import UserError
from .base import EmbeddingRows

_FAR = 8  # times the median


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and float32 scales [O] with weight ~ int8 * scale: symmetric, to the nearest, by row."""
    scales = weight.abs().amax(1).float().clamp_(min=1e-12).div_(127)
    # In float32: bfloat16 has no 127.4, and 128 is no int8.
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


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


def refuse_to_unpack() -> NoReturn:
    """Raise the UserError of `LinearMethod.unpack`."""
    raise UserError(
        "this model was loaded with 8-bit weights, from which the checkpoint's weights cannot be restored: "
        "load it without quantization to read or change weights"
    )


class Int8Rows(EmbeddingRows):
    """An embedding's table in 8 bits, with a scale for each row."""

    def __init__(self, weight: Tensor) -> None:
        self._rows, self._scales = quantize_rows(weight)
        self._dtype = weight.dtype

    def __getitem__(self, ids: Tensor) -> Tensor:
        """[...] -> [..., W]"""
        return (self._rows[ids] * self._scales[ids][..., None]).to(self._dtype)

    def table(self) -> Tensor:
        """[V, W]. Quantising it again gives the same 8-bit numbers."""
        return (self._rows * self._scales[:, None]).to(self._dtype)
