"""torch's own linear: any device and any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import LinearMethod, apply_epilogue


class TorchLinear(LinearMethod):
    """torch.nn.functional.linear; the weight stays what and where it is."""

    keeps_weight = True

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """True: torch computes with every dtype on every device."""
        return True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

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
        if relu and bias is not None and x.is_cuda:  # one kernel: ReLU in the product's epilogue
            return torch._addmm_activation(bias, x, self.weight.t())
        return apply_epilogue(linear(x, self.weight, bias), relu, residual)

    def unpack(self) -> Tensor:
        """The weight itself, not a copy."""
        return self.weight
