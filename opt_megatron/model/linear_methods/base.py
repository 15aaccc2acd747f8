"""The interface of a linear method.

T = tokens of the step (any number), I = inputs, O = outputs, both of this tensor parallel rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class EmbeddingRows(ABC):
    """An embedding's table [V, W] in the form that a linear method stores."""

    @abstractmethod
    def __init__(self, weight: Tensor) -> None:
        """Make it from the float table [V, W], which it does not refer to afterwards."""

    @abstractmethod
    def __getitem__(self, ids: Tensor) -> Tensor:
        """Rows [..., W] for ids [...], in any float dtype."""

    @abstractmethod
    def table(self) -> Tensor:
        """The rows of all ids, [V, W]: the head is made from it where it is tied to this embedding."""


class LinearMethod(ABC):
    """A weight [O, I] as one method stores it, and its product with activations.

    The class is the method and an instance is one layer's weight, so that what a method needs can be asked before
    there is a weight. A checkpoint holds float weights, whatever the method: `unpack` gives what would be written.

    Attributes:
        keeps_weight: an instance refers to the float weight, so the layer keeps its parameter.
        loads_deferred: the float weights of a model are never held together. Its layers are made on the meta device,
            and loading hands them one float weight after the other.
        weight_dtype: of the float weights that loading hands over, where it is not that of the model's parameters.
        embedding_rows: how the embedding's table is stored; None leaves it a float parameter.
        head_method: stores the head's weight; None: this method, as that of the other linear layers.
    """

    keeps_weight: ClassVar[bool] = False
    loads_deferred: ClassVar[bool] = False
    weight_dtype: ClassVar[torch.dtype | None] = None
    embedding_rows: ClassVar[type[EmbeddingRows] | None] = None
    head_method: ClassVar[type[LinearMethod] | None] = None

    @classmethod
    def with_group_size(cls, group_size: int) -> type[LinearMethod]:
        """The same method with groups of another size, where the registry says that it has groups."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this machine can compute with weights of `dtype` on `device` by this method."""

    @abstractmethod
    def __init__(self, weight: Tensor) -> None:
        """Make it from the float weight [O, I], which has no gradient."""

    @abstractmethod
    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        skip_zeros: bool = False,
    ) -> Tensor:
        """x A^T + bias + residual, or relu(x A^T + bias); nothing is written into the arguments.

        Args:
            x: [T, I]
            bias: [O]
            relu: excludes `residual`.
            residual: [T, O]
            skip_zeros: many inputs are zero in every token, as after ReLU: a method may read their weights or not.

        Returns:
            [T, O] in the dtype of `x`.
        """

    @abstractmethod
    def unpack(self) -> Tensor:
        """The float weight [O, I] that this was made from, to the bit.

        Raises:
            UserError: the method keeps less than that.
        """


def apply_epilogue(output: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """ReLU or the residual, in place: for methods whose product does not include them."""
    if relu:
        return output.relu_()
    return output if residual is None else output.add_(residual)
