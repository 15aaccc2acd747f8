"""8-bit weights and activations on a CPU, by the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cpu_kernels import INT8, TiledWeight, empty_in_huge_pages, in_tiles, library
from .equalization import equalize_columns
from .int8_rows import quantize_rows
from .quantized_method import QuantizedMethod

_GROUP = 64  # inputs


class CPUInt8Linear(QuantizedMethod):
    """8-bit weights with a scale for each output channel, 8-bit activations with a scale for each 64 inputs of a token.

    Products are added in 32-bit integers. Activations are quantised within the kernel; a large one costs the other 63
    of its group their precision, and no others.
    """

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On a CPU with AVX2 or AVX-512 VNNI, for float32 activations, where the kernels were compiled."""
        kernels = library()
        is_fast = kernels is not None and kernels.instruction_set != "base"
        return device.type == "cpu" and dtype == torch.float32 and is_fast

    def __init__(self, weight: Tensor) -> None:
        num_outputs, num_inputs = weight.shape
        weight, factors = equalize_columns(weight)
        quantized, scales = quantize_rows(weight)
        padded = pad(quantized, (0, -num_inputs % _GROUP)).to(torch.int16) + 128
        tiles = in_tiles(padded.to(torch.uint8)).unflatten(2, (-1, 4)).transpose(1, 2)  # [tiles, I / 4, 64, 4]
        values = empty_in_huge_pages(tuple(tiles.shape), torch.uint8).copy_(tiles)
        self._weight = TiledWeight(
            INT8, (num_outputs, num_inputs), values, in_tiles(scales), factors=factors, group=_GROUP
        )

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        skip_zeros: bool = False,
    ) -> Tensor:
        """[T, I] -> [T, O]"""
        return self._weight.multiply(x, bias, relu=relu, residual=residual, skip_zeros=skip_zeros)
