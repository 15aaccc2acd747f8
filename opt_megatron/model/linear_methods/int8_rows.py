"""Symmetric 8-bit quantisation by row, which the int8 methods and their embedding share."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import EmbeddingRows


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and float32 scales [O] with weight ~ int8 * scale: symmetric, to the nearest, by row."""
    scales = weight.abs().amax(1).float().clamp_(min=1e-12).div_(127)
    # In float32: bfloat16 has no 127.4, and 128 is no int8.
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


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
