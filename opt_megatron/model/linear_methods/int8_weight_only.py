"""8-bit weights only, with activations as they are: where oneDNN's 8-bit product is not available, as on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import apply_epilogue
from .equalization import equalize_columns, multiplied
from .int8_rows import quantize_rows
from .quantized_method import QuantizedMethod


class Int8WeightOnlyLinear(QuantizedMethod):
    """8-bit weights that are converted to the activations' dtype before the product.

    The weights are scaled before the product: sums of 8-bit numbers times activations could exceed float16's range.
    """

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """True: it needs nothing but a conversion of 8-bit numbers and torch's linear."""
        return True

    def __init__(self, weight: Tensor) -> None:
        weight, self._factors = equalize_columns(weight)
        self._weight, self._channels = quantize_rows(weight)

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
        weight = self._weight.to(x.dtype).mul_(self._channels[:, None].to(x.dtype))
        return apply_epilogue(linear(multiplied(x, self._factors), weight, bias), relu, residual)
