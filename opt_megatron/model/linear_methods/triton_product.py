"""What products in Triton have in common, however their weights are stored: launch, and end of the kernel.

Not yet run on a GPU: the tests run the kernels in Triton's interpreter, in float32 and float16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def is_for_triton(device: torch.device) -> bool:
    """On CUDA devices, but not with a CPU build of torch."""
    return device.type == "cuda" and torch.version.cuda is not None


def multiply(
    kernel: Any,
    x: Tensor,
    weight: tuple[Tensor, ...],
    num_outputs: int,
    bias: Tensor | None,
    relu: bool,
    residual: Tensor | None,
    **constants: int,
) -> Tensor:
    """Launch a kernel for all blocks of the output.

    Args:
        kernel: takes pointers to x, bias, residual, output and the tensors of `weight`, then the sizes T, O and I, and
            HAS_BIAS, HAS_RELU, HAS_RESIDUAL, TOKENS and OUTPUTS (of a block), and `constants`.
        x: [T, I]

    Returns:
        [T, O] in the dtype of `x`.
    """
    num_tokens, num_inputs = x.shape
    output = x.new_empty(num_tokens, num_outputs)
    tokens, outputs = _block_sizes(num_tokens)
    kernel[(triton.cdiv(num_outputs, outputs), triton.cdiv(num_tokens, tokens))](
        x.contiguous(),
        # Where there is none, any pointer does: it is not read.
        x if bias is None else bias,
        x if residual is None else residual.contiguous(),
        output,
        *weight,
        num_tokens,
        num_outputs,
        num_inputs,
        HAS_BIAS=bias is not None,
        HAS_RELU=relu,
        HAS_RESIDUAL=residual is not None,
        TOKENS=tokens,
        OUTPUTS=outputs,
        **constants,
    )
    return output


def _block_sizes(num_tokens: int) -> tuple[int, int]:
    """Tokens and outputs of a block: for few tokens many narrow blocks, to read the weights with the whole GPU."""
    tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))  # a product of Triton has 16 rows or more
    return tokens, 16 if tokens == 16 else 64


@triton.jit
def finish(  # type: ignore[no-untyped-def]  # compiled by Triton
    sums,
    tokens,
    rows,
    num_tokens,
    num_outputs,
    bias_pointer,
    residual_pointer,
    output_pointer,
    HAS_BIAS: tl.constexpr,
    HAS_RELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Add bias, ReLU or residual to the sums [tokens, rows] of a block, and store them."""
    is_row, is_token = rows < num_outputs, tokens < num_tokens
    if HAS_BIAS:
        sums += tl.load(bias_pointer + rows, mask=is_row, other=0.0)[None, :].to(tl.float32)
    if HAS_RELU:
        sums = tl.maximum(sums, 0.0)
    place = tokens[:, None].to(tl.int64) * num_outputs + rows[None, :]
    is_output = is_token[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        sums += tl.load(residual_pointer + place, mask=is_output, other=0.0).to(tl.float32)
    tl.store(output_pointer + place, sums.to(output_pointer.dtype.element_ty), mask=is_output)
