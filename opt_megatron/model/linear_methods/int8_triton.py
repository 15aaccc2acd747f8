"""8-bit weights on a GPU, read as they are: a product in Triton with bias, ReLU and residual in the same kernel.

Each weight is one byte of the memory's traffic for up to 64 tokens. (torch's own `_weight_int8pack_mm` computes one
output a thread in float32; converting the weights before torch's product moves five bytes for each.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .equalization import equalize_columns, multiplied
from .int8_rows import quantize_rows
from .quantized_method import QuantizedMethod
from .triton_product import finish, is_for_triton, multiply

_INPUTS = 128  # of a block


class Int8TritonLinear(QuantizedMethod):
    """8-bit weights; sums in float32, which are scaled at the end, so that float16 cannot overflow before."""

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """See `is_for_triton`."""
        return is_for_triton(device)

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
        weight = self._weight, self._channels
        x = multiplied(x, self._factors)
        return multiply(_linear, x, weight, len(self._channels), bias, relu, residual, INPUTS=_INPUTS)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]  # compiled by Triton
    x_pointer,
    bias_pointer,
    residual_pointer,
    output_pointer,
    weight_pointer,
    scales_pointer,
    num_tokens,
    num_outputs,
    num_inputs,
    HAS_BIAS: tl.constexpr,
    HAS_RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_row, is_token = rows < num_outputs, tokens < num_tokens
    rows_begin = weight_pointer + rows[:, None].to(tl.int64) * num_inputs
    tokens_begin = x_pointer + tokens[:, None].to(tl.int64) * num_inputs
    sums = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for first in range(0, num_inputs, INPUTS):
        columns = (first + tl.arange(0, INPUTS))[None, :]
        is_column = columns < num_inputs
        x = tl.load(tokens_begin + columns, mask=is_token[:, None] & is_column, other=0.0)
        weight = tl.load(rows_begin + columns, mask=is_row[:, None] & is_column, other=0)
        sums = tl.dot(x, tl.trans(weight.to(x.dtype)), sums, input_precision="ieee")
    sums *= tl.load(scales_pointer + rows, mask=is_row, other=0.0)[None, :]
    finish(
        sums, tokens, rows, num_tokens, num_outputs, bias_pointer, residual_pointer, output_pointer,
        HAS_BIAS, HAS_RELU, HAS_RESIDUAL,
    )  # fmt: skip
