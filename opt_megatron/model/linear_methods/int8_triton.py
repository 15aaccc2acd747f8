"""8-bit weights on a GPU, read as they are: a product in Triton with bias, ReLU and residual in the same kernel.

Each weight is one byte of the memory's traffic for up to 64 tokens. (torch's own `_weight_int8pack_mm` computes one
output a thread in float32; converting the weights before torch's product moves five bytes for each.)

Not yet run on a GPU: the tests run the kernel in Triton's interpreter, in float32 and float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .base import LinearMethod
from .int8_rows import Int8Rows, equalize_columns, multiplied, quantize_rows, refuse_to_unpack

_INPUTS = 128  # of a block


class Int8TritonLinear(LinearMethod):
    """8-bit weights; sums in float32, which are scaled at the end, so that float16 cannot overflow before."""

    loads_deferred = True
    embedding_rows = Int8Rows

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On CUDA devices, but not with a CPU build of torch."""
        return device.type == "cuda" and torch.version.cuda is not None

    def __init__(self, weight: Tensor) -> None:
        weight, self._factors = equalize_columns(weight)
        self._weight, self._channels = quantize_rows(weight)

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        num_tokens, (num_outputs, num_inputs) = len(x), self._weight.shape
        output = x.new_empty(num_tokens, num_outputs)
        tokens, outputs = block_sizes(num_tokens)
        _linear[(triton.cdiv(num_outputs, outputs), triton.cdiv(num_tokens, tokens))](
            multiplied(x, self._factors).contiguous(),
            self._weight,
            self._channels,
            # Where there is none, any pointer does: it is not read.
            x if bias is None else bias,
            x if residual is None else residual.contiguous(),
            output,
            num_tokens,
            num_outputs,
            num_inputs,
            HAS_BIAS=bias is not None,
            HAS_RELU=relu,
            HAS_RESIDUAL=residual is not None,
            TOKENS=tokens,
            OUTPUTS=outputs,
            INPUTS=_INPUTS,
        )
        return output

    def unpack(self) -> Tensor:
        """Raises UserError: the float weight was not kept."""
        refuse_to_unpack()


def block_sizes(num_tokens: int) -> tuple[int, int]:
    """Tokens and outputs of a block: for few tokens many narrow blocks, to read the weights with the whole GPU."""
    tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))  # a product of Triton has 16 rows or more
    return tokens, 16 if tokens == 16 else 64


@triton.jit
def _linear(  # type: ignore[no-untyped-def]  # compiled by Triton
    x_pointer,
    weight_pointer,
    scales_pointer,
    bias_pointer,
    residual_pointer,
    output_pointer,
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
    if HAS_BIAS:
        sums += tl.load(bias_pointer + rows, mask=is_row, other=0.0)[None, :].to(tl.float32)
    if HAS_RELU:
        sums = tl.maximum(sums, 0.0)
    place = tokens[:, None].to(tl.int64) * num_outputs + rows[None, :]
    is_output = is_token[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual_pointer + place, mask=is_output, other=0.0).to(tl.float32)
    tl.store(output_pointer + place, sums.to(output_pointer.dtype.element_ty), mask=is_output)
