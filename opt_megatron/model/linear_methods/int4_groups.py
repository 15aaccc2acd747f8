"""4-bit quantisation by groups of inputs, which the int4 methods share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import LinearMethod
from .equalization import equalize_columns
from .quantized_method import QuantizedMethod


class Int4Weight(NamedTuple):
    """A weight [O, I] as numbers of 4 bits: (number - zero of its group) * scale of its group. G groups of inputs.

    Attributes:
        numbers: uint8 [O, G * group size], from 0 to 15; those beyond I stand for zeros.
        scales: float32 [O, G]
        zeros: uint8 [O, G], from 0 to 15.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def rounded(cls, weight: Tensor, group_size: int) -> Self:
        """Round to the nearest of 16 steps between the smallest and the largest weight of a group, 0 included."""
        groups = pad(weight.float(), (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))  # [O, G, size]
        low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
        scales = (high - low).div_(15).clamp_(min=1e-12)
        zeros = (-low / scales).round_()
        numbers = (groups / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
        return cls(numbers.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8))


class Int4Method(QuantizedMethod):
    """A linear method with 4-bit weights. The embedding and the output head have 8 bits: their rows have no groups
    to spare, and every logit depends on them.

    Attributes:
        group_size: inputs that share a scale.
    """

    group_size: ClassVar[int] = 128

    def __init__(self, weight: Tensor) -> None:
        weight, factors = equalize_columns(weight)
        self._store(Int4Weight.rounded(weight, self.group_size), weight.shape[1], factors)

    @classmethod
    def of_numbers(cls, weight: Int4Weight) -> Self:
        """Make it from numbers that a checkpoint holds, in groups of this method's size, which divides the inputs."""
        made = cls.__new__(cls)
        made._store(weight, weight.numbers.shape[1], None)
        return made

    @abstractmethod
    def _store(self, weight: Int4Weight, num_inputs: int, factors: Tensor | None) -> None:
        """Keep the numbers as the product reads them.

        Args:
            num_inputs: I, without padding.
            factors: [I], by which inputs are multiplied; None: they are not.
        """

    @classmethod
    def with_group_size(cls, group_size: int) -> type[LinearMethod]:
        """The same method with groups of another size."""
        return type(f"{cls.__name__}Of{group_size}", (cls,), {"group_size": group_size})
