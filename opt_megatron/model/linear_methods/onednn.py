"""oneDNN's product on a CPU, with the weight in its blocked order and the rest fused into it.

On an AMD processor it read a 125m's weights at the speed of memory where torch's linear (MKL) took 3.5 times as
long, at any batch size. The operators are those that torch's own compiler emits for frozen weights
(torch/_inductor, mkldnn fusion).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LinearMethod

_TOKENS = 16  # per step, that the blocked order is chosen for: good from 1 to 512 where it was measured


class OneDNNLinear(LinearMethod):
    """The float weight in oneDNN's blocked order, an opaque tensor of the same numbers."""

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On a CPU, where torch was built with oneDNN and the processor computes with the dtype."""
        if device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        mkldnn = torch.ops.mkldnn
        if not hasattr(mkldnn, "_reorder_linear_weight") or not hasattr(mkldnn, "_linear_pointwise"):
            return False
        if dtype == torch.bfloat16:
            return mkldnn._is_mkldnn_bf16_supported()
        if dtype == torch.float16:
            return mkldnn._is_mkldnn_fp16_supported()
        return dtype == torch.float32

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _TOKENS)

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
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, bias, "relu" if relu else "none", [], "")

    def unpack(self) -> Tensor:
        """The weight in its ordinary order, a new tensor."""
        return self._weight.to_dense()
