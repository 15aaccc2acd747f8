"""Megatron's parallel linear layers, with one matrix product and its bias in one call when nothing is trained.

Core adds the bias in a step of its own and wraps the product in an autograd function. In inference that
costs time, and it rounds differently from torch's `linear`: with these, an fp32 OPT on one tensor parallel
rank gives transformers' logits to the bit. Where gradients are needed, everything is core's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.nn.functional import linear


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class OPTColumnParallelLinear(ColumnParallelLinear):
    """x A^T + b with the rows of A divided over the tensor parallel ranks; the bias is always added here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"skip_bias_add": False}))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.sequence_parallel or _needs_gradient(input, weight):
            return super()._forward_impl(input, weight, *args, **kwargs)
        return linear(input, weight, kwargs["bias"])


class OPTRowParallelLinear(RowParallelLinear):
    """x A^T + b with the columns of A divided; the partial products are summed over the ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adds_bias = self.tp_group.rank() == 0  # once in the sum

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs of this rank] -> [s, b, outputs], and the bias where core leaves it to the caller"""
        if self.sequence_parallel or _needs_gradient(input_, self.weight):
            return super().forward(input_)
        partial = linear(input_, self.weight, self.bias if self._adds_bias else None)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None
