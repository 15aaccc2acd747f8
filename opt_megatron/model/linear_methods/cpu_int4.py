"""4-bit weights and 8-bit activations on a CPU, by the kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpu_kernels import INT4, TiledWeight, empty_in_huge_pages, in_tiles
from .cpu_int8 import CPUInt8Linear
from .int4_groups import Int4Method, Int4Weight


class CPUInt4Linear(Int4Method):
    """4-bit weights with a scale and a zero for each group of inputs; activations have a scale for the same groups."""

    head_method = CPUInt8Linear

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """As CPUInt8Linear, whose processors these are too."""
        return CPUInt8Linear.is_available(device, dtype)

    def _store(self, weight: Int4Weight, num_inputs: int, factors: Tensor | None) -> None:
        numbers, scales, zeros = weight
        eights = in_tiles(numbers).unflatten(2, (-1, 2, 4))  # [tiles, 64, I / 8, 2, 4]
        bytes_ = (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2)  # [tiles, I / 8, 64, 4]
        values = empty_in_huge_pages(tuple(bytes_.shape), torch.uint8).copy_(bytes_)
        scales, zeros = (in_tiles(each).transpose(1, 2).contiguous() for each in (scales, zeros))  # [tiles, groups, 64]
        self._weight = TiledWeight(
            INT4, (numbers.shape[0], num_inputs), values, scales, zeros, factors, self.group_size
        )

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
        return self._weight.multiply(x, bias, relu=relu, residual=residual, skip_zeros=skip_zeros)
