"""4-bit weights on a GPU, read as they are: a product in Triton with bias, ReLU and residual in the same kernel.

Each weight is half a byte of the memory's traffic, and its group's scale and zero 5 bytes. (torch's own
`_weight_int4pack_mm` takes bfloat16 alone, and only sizes that its tiles divide.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from .equalization import multiplied
from .int4_groups import Int4Method, Int4Weight
from .int8_triton import Int8TritonLinear
from .triton_product import finish, is_for_triton, multiply

_HALF = 64  # of a block's inputs; byte j of the 64 has input j in its lower half, and input j + 64 in its upper


class Int4TritonLinear(Int4Method):
    """4-bit weights that become the activations' dtype in the registers; sums in float32."""

    head_method = Int8TritonLinear

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """See `is_for_triton`."""
        return is_for_triton(device)

    def _store(self, weight: Int4Weight, num_inputs: int, factors: Tensor | None) -> None:
        self._factors = factors
        numbers, self._scales, self._zeros = weight
        halves = pad(numbers, (0, -numbers.shape[1] % (2 * _HALF))).unflatten(1, (-1, 2, _HALF))
        self._bytes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)  # [O, inputs / 2]

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
        weight = self._bytes, self._scales, self._zeros
        x = multiplied(x, self._factors)
        sizes = {"HALF": _HALF, "GROUP": self.group_size}
        return multiply(_linear, x, weight, len(self._bytes), bias, relu, residual, **sizes)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]  # compiled by Triton
    x_pointer,
    bias_pointer,
    residual_pointer,
    output_pointer,
    bytes_pointer,
    scales_pointer,
    zeros_pointer,
    num_tokens,
    num_outputs,
    num_inputs,
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
    num_groups = tl.cdiv(num_inputs, GROUP)
    num_bytes = tl.cdiv(num_groups * GROUP, 2 * HALF) * HALF  # of a row
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
    finish(
        sums, tokens, rows, num_tokens, num_outputs, bias_pointer, residual_pointer, output_pointer,
        HAS_BIAS, HAS_RELU, HAS_RESIDUAL,
    )  # fmt: skip
