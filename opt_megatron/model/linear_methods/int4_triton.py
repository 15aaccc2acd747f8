"""4-bit weights on a GPU, read as they are: a product in Triton with bias, ReLU and residual in the same kernel.

Each weight is half a byte of the memory's traffic, and its group's scale and zero 5 bytes. (torch's own
`_weight_int4pack_mm` takes bfloat16 alone, and only sizes that its tiles divide.)

Not yet run on a GPU: the tests run the kernel in Triton's interpreter, in float32 and float16.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .base import LinearMethod
from .int4_groups import Int4Method, Int4Weight
from .int8_rows import equalize_columns, multiplied
from .int8_triton import Int8TritonLinear, block_sizes

_INPUTS = 128  # of a block; byte j of its 64 has input j in its lower half, and input j + 64 in its upper


class Int4TritonLinear(Int4Method):
    """4-bit weights that become the activations' dtype in the registers; sums in float32."""

    head_method: ClassVar[type[LinearMethod] | None] = Int8TritonLinear

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On CUDA devices, but not with a CPU build of torch."""
        return device.type == "cuda" and torch.version.cuda is not None

    def __init__(self, weight: Tensor) -> None:
        self._num_inputs = weight.shape[1]
        weight, self._factors = equalize_columns(weight)
        numbers, self._scales, self._zeros = Int4Weight.rounded(weight, self.group_size)
        halves = pad(numbers, (0, -numbers.shape[1] % _INPUTS)).unflatten(1, (-1, 2, _INPUTS // 2))
        self._bytes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)  # [O, inputs / 2]

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        num_tokens, num_outputs = len(x), len(self._bytes)
        output = x.new_empty(num_tokens, num_outputs)
        tokens, outputs = block_sizes(num_tokens)
        _linear[(triton.cdiv(num_outputs, outputs), triton.cdiv(num_tokens, tokens))](
            multiplied(x, self._factors).contiguous(),
            self._bytes,
            self._scales,
            self._zeros,
            # Where there is none, any pointer does: it is not read.
            x if bias is None else bias,
            x if residual is None else residual.contiguous(),
            output,
            num_tokens,
            num_outputs,
            self._num_inputs,
            self._bytes.shape[1],
            self._scales.shape[1],
            HAS_BIAS=bias is not None,
            HAS_RELU=relu,
            HAS_RESIDUAL=residual is not None,
            TOKENS=tokens,
            OUTPUTS=outputs,
            HALF=_INPUTS // 2,
            GROUP=self.group_size,
        )
        return output


@triton.jit
def _linear(  # type: ignore[no-untyped-def]  # compiled by Triton
    x_pointer,
    bytes_pointer,
    scales_pointer,
    zeros_pointer,
    bias_pointer,
    residual_pointer,
    output_pointer,
    num_tokens,
    num_outputs,
    num_inputs,
    num_bytes,
    num_groups,
    HAS_BIAS: tl.constexpr,
    HAS_RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_row, is_token = rows < num_outputs, tokens < num_tokens
    tokens_begin = x_pointer + tokens[:, None].to(tl.int64) * num_inputs
    sums = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for first in range(0, num_bytes, HALF):
        places = rows[:, None].to(tl.int64) * num_bytes + (first + tl.arange(0, HALF))[None, :]
        both = tl.load(bytes_pointer + places, mask=is_row[:, None], other=0)
        for half in tl.static_range(2):
            columns = (2 * first + half * HALF + tl.arange(0, HALF))[None, :]
            x = tl.load(tokens_begin + columns, mask=is_token[:, None] & (columns < num_inputs), other=0.0)
            groups = rows[:, None].to(tl.int64) * num_groups + columns // GROUP
            is_group = is_row[:, None] & (columns // GROUP < num_groups)
            zero = tl.load(zeros_pointer + groups, mask=is_group, other=0).to(tl.float32)
            scale = tl.load(scales_pointer + groups, mask=is_group, other=0.0)
            number = (both >> (4 * half)) & 15
            weight = (number.to(tl.float32) - zero) * scale
            sums = tl.dot(x, tl.trans(weight.to(x.dtype)), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_pointer + rows, mask=is_row, other=0.0)[None, :].to(tl.float32)
    if HAS_RELU:
        sums = tl.maximum(sums, 0.0)
    place = tokens[:, None].to(tl.int64) * num_outputs + rows[None, :]
    is_output = is_token[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual_pointer + place, mask=is_output, other=0.0).to(tl.float32)
    tl.store(output_pointer + place, sums.to(output_pointer.dtype.element_ty), mask=is_output)
