"""Grids of integers for weights, and rounding to nearest.

The conventions are those of GPTQ's own program (IST-DASLab/gptq, quant.py): the grid covers the weights and zero, zero
stays exactly zero, scale and zero point are floats, and halves are rounded to even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .recipe import WHOLE_ROW, Quantize


@dataclass(frozen=True)
class Grid:
    """The values scale * (code - zero) for codes from 0 to `highest`.

    Attributes:
        scale, zero: [..., 1], one for each last dimension of the weights that are rounded.
    """

    scale: Tensor
    zero: Tensor
    highest: int

    @classmethod
    def covering(cls, weight: Tensor, bits: int, *, symmetric: bool) -> Grid:
        """The grid of 2^bits values from the smallest to the largest of weights [..., n], zero included."""
        highest = 2**bits - 1
        low, high = weight.amin(-1, keepdim=True).clamp_(max=0), weight.amax(-1, keepdim=True).clamp_(min=0)
        if symmetric:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
        is_empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(is_empty, -1), high.masked_fill(is_empty, 1)
        scale = (high - low) / highest
        zero = torch.full_like(scale, (highest + 1) / 2) if symmetric else (-low / scale).round_()
        return cls(scale, zero, highest)

    @classmethod
    def absmax(cls, weight: Tensor, bits: int) -> Grid:
        """The grid of int8 kernels and SmoothQuant's program: the largest |w| of weights [..., n] on the largest value.

        It is symmetric, and code 0 is not used.
        """
        half = 2 ** (bits - 1)
        scale = weight.abs().amax(-1, keepdim=True).clamp_(min=1e-5) / (half - 1)
        return cls(scale, torch.full_like(scale, half), 2 * half - 1)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes of the nearest values, as floats, [..., n]."""
        return (weight / self.scale).round_().add_(self.zero).clamp_(0, self.highest)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values, [..., n]."""
        return self.codes(weight).sub_(self.zero).mul_(self.scale)


@dataclass(frozen=True)
class GroupedGrids:
    """The grids of a matrix [O, I] of which some columns share one; G groups.

    Attributes:
        scales, zeros: [O, G]
        group_of: int64 [I], the group of every column.
        bits: of a code.
    """

    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int

    @classmethod
    def join(cls, grids: list[Grid], group_of: Tensor, bits: int) -> GroupedGrids:
        """Of grids [O, 1] in the order of the groups."""
        scales, zeros = (torch.cat([getattr(grid, name) for grid in grids], 1) for name in ("scale", "zero"))
        return cls(scales, zeros, group_of, bits)

    def codes(self, rounded: Tensor) -> Tensor:
        """uint8 [O, I], the codes of weights that are on the grids."""
        scales, zeros = self.scales[:, self.group_of], self.zeros[:, self.group_of]
        return (rounded / scales + zeros).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def in_dtype(self, rounded: Tensor, dtype: torch.dtype) -> tuple[Tensor, GroupedGrids]:
        """Weights with the same codes on grids whose scales `dtype` holds, and these grids."""
        grids = replace(self, scales=self.scales.to(dtype).float())
        scales, zeros = grids.scales[:, self.group_of], self.zeros[:, self.group_of]
        return (self.codes(rounded) - zeros) * scales, grids


def columns_per_group(quantize: Quantize, num_inputs: int) -> int:
    """How many columns share a grid; the last group may have fewer."""
    return num_inputs if quantize.group_size == WHOLE_ROW else min(quantize.group_size, num_inputs)


def round_to_nearest(weight: Tensor, quantize: Quantize) -> tuple[Tensor, GroupedGrids]:
    """Round every weight [O, I] by itself, and return the grids too."""
    parts = weight.split(columns_per_group(quantize, weight.size(1)), dim=1)
    grids = [_grid_of(part, quantize) for part in parts]
    rounded = torch.cat([grid.round(part) for grid, part in zip(grids, parts, strict=True)], 1)
    sizes = torch.tensor([part.size(1) for part in parts])
    group_of = torch.arange(len(parts)).repeat_interleave(sizes).to(weight.device)
    return rounded, GroupedGrids.join(grids, group_of, quantize.bits)


def _grid_of(weight: Tensor, quantize: Quantize) -> Grid:
    if quantize.method == "absmax":
        return Grid.absmax(weight, quantize.bits)
    return Grid.covering(weight, quantize.bits, symmetric=quantize.symmetric)
