"""4-bit weights only, with activations as they are: where there are no kernels for 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .base import apply_epilogue
from .equalization import multiplied
from .int4_groups import Int4Method, Int4Weight
from .int8_weight_only import Int8WeightOnlyLinear


class Int4WeightOnlyLinear(Int4Method):
    """4-bit weights, two a byte, that become the activations' dtype before the product."""

    head_method = Int8WeightOnlyLinear

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """True: it needs nothing but torch's linear."""
        return True

    def _store(self, weight: Int4Weight, num_inputs: int, factors: Tensor | None) -> None:
        numbers, self._scales, self._zeros = weight
        self._bytes = numbers[:, ::2] | numbers[:, 1::2] << 4
        self._num_inputs, self._factors = num_inputs, factors

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
        numbers = torch.stack((self._bytes & 15, self._bytes >> 4), dim=-1).flatten(1)  # [O, I padded]
        groups = numbers.unflatten(1, (-1, self.group_size)).to(x.dtype) - self._zeros[..., None].to(x.dtype)
        weight = groups.mul_(self._scales[..., None].to(x.dtype)).flatten(1)[:, : self._num_inputs]
        return apply_epilogue(linear(multiplied(x, self._factors), weight, bias), relu, residual)
