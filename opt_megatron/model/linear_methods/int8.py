"""oneDNN's 8-bit product on a CPU: 8-bit weights by output channel, 8-bit activations by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import apply_epilogue
from .equalization import equalize_columns, multiplied
from .int8_rows import quantize_rows
from .quantized_method import QuantizedMethod


class Int8Linear(QuantizedMethod):
    """8-bit weights with a scale for each output channel, 8-bit activations with a scale for each token.

    Each token has its own scale, where torch's dynamic linear has one for the whole batch, so that a request's
    result does not depend on what else is in the batch. Symmetric: weight = round(w / max|w| * 127)
    by row, and activations likewise by token; with half as many steps where the processor adds pairs of
    products in 16 bits, which could overflow.
    """

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On a CPU, where torch was built with oneDNN."""
        return (
            device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.onednn, "qlinear_prepack")
            and hasattr(torch.ops.onednn, "qlinear_pointwise")
        )

    def __init__(self, weight: Tensor) -> None:
        weight, self._factors = equalize_columns(weight)
        quantized, scales = quantize_rows(weight)
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.levels = 127 if _adds_in_32_bits() else 63  # steps of an activation to either side of zero
        self._offset = torch.tensor(self.levels + 1.5)
        # One factor for the whole product: oneDNN's kernels for few and for many tokens round two in different orders.
        self._channels = scales / self.levels

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
        x = multiplied(x, self._factors)
        largest = x.abs().amax(-1, keepdim=True).float()  # [T, 1]
        # zero point + x / largest * levels; adding a half and cutting off rounds to the nearest (in float32: in half
        # precision 128.5 cannot be represented). A row of zeros divides by zero, gives any 8-bit numbers, and is
        # multiplied by zero below.
        quantized = torch.addcdiv(self._offset, x.float(), largest, value=self.levels).to(torch.uint8)
        # In float32: a processor without 16-bit products takes a thousand times as long for a 16-bit output.
        product = torch.ops.onednn.qlinear_pointwise.default(
            quantized, 1.0, self.levels + 1, self._weight, self._channels, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        output = product.mul_(largest) if bias is None else torch.addcmul(bias.float(), product, largest)
        return apply_epilogue(output.to(x.dtype), relu, residual)


def _adds_in_32_bits() -> bool:
    return torch.cpu._is_vnni_supported()
