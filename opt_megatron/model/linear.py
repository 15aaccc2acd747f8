"""Megatron's parallel linear layers with OPT's inference: one call a product, by a linear method (linear_methods/).

Core adds the bias in a separate step and wraps the product in an autograd function. In inference that
costs time, and it rounds differently from torch's `linear`: with these, an fp32 OPT on one tensor parallel
rank gives transformers' logits to the bit. Where gradients are needed, the products are core's on a GPU and
oneDNN's on a CPU (differentiable_linear.py), with core's collectives around them.

`prepare_inference` replaces the weight by what the linear method stores, which is what decoding uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from .differentiable_linear import differentiable_linear
from .linear_methods.base import LinearMethod
from .linear_methods.int4_groups import Int4Method, Int4Weight
from .linear_methods.torch_linear import TorchLinear


def _is_trained(x: Tensor, weight: Tensor) -> bool:
    """Whether the model is being trained (or validated in between), rather than run."""
    return weight.requires_grad or (torch.is_grad_enabled() and x.requires_grad)


def mark_sequence_parallel(parameter: Tensor, is_sequence_parallel: bool) -> None:
    """Tell core whether each tensor parallel rank computes the parameter's gradient from its part of a sequence.

    Core then sums the gradients over the ranks.
    """
    setattr(parameter, "sequence_parallel", is_sequence_parallel)  # noqa: B010  (no attribute of torch's)


class DeferredWeight(nn.Module):
    """A module whose `weight` may have a shape and no memory until `store_weight` is given the values.

    Attributes:
        method: how `store_weight` stores the weight.
    """

    weight: nn.Parameter | None

    method: type[LinearMethod]

    def defer_weight(self) -> None:
        """Free the weight's memory; from now on it has the dtype in which the method takes it."""
        if self.weight is not None:
            dtype = self.method.weight_dtype or self.weight.dtype
            self.weight = nn.Parameter(self.weight.to("meta", dtype), requires_grad=False)

    def store_weight(self, weight: Tensor) -> None:
        """Store `weight`, which has the shape and dtype of the parameter."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight = self._parameters.get("weight")
        if weight is None or weight.device.type != "meta":
            return super()._apply(fn, recurse)
        del self._parameters["weight"]  # has no memory that could be moved or cast
        result = super()._apply(fn, recurse)
        self._parameters["weight"] = weight
        return result


class PackableLinear(DeferredWeight):
    """A linear layer whose weight [O, I] a linear method may store instead.

    Attributes:
        packed: the weight as the linear method stores it, which computes in inference; None while the weight is an
            ordinary parameter.
    """

    bias: nn.Parameter | None
    sequence_parallel: bool
    tp_group: dist.ProcessGroup
    method: type[LinearMethod] = TorchLinear
    packed: LinearMethod | None = None

    def float_weight(self) -> nn.Parameter:
        """The weight while it is an ordinary parameter."""
        assert self.weight is not None, "the weight is tied or packed"
        return self.weight

    def store_weight(self, weight: Tensor) -> None:
        """Store it by the layer's method."""
        self.packed = self.method(weight)

    def store_numbers(self, weight: Int4Weight) -> None:
        """As `store_weight`, of numbers that a checkpoint holds; the layer's method is one with 4 bits."""
        assert issubclass(self.method, Int4Method)
        self.packed = self.method.of_numbers(weight)

    def prepare_inference(self, method: type[LinearMethod]) -> None:
        """Let `method` store the weight, and drop the parameter if it is not needed any more."""
        if self.packed is None:
            self._pack(self.float_weight(), method)

    def infer(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """[T, inputs of this rank] -> [T, outputs of this rank]; after `prepare_inference`."""
        packed = self.packed
        assert packed is not None
        return packed(x, self.bias, relu=relu, residual=residual)

    def _pack(self, weight: Tensor, method: type[LinearMethod]) -> None:
        self.packed = method(weight.detach())
        if self.weight is not None and not method.keeps_weight:
            self.register_parameter("weight", None)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Core's product; while training on a CPU `differentiable_linear` with core's collectives."""
        if weight.device.type != "cpu" or not (self.sequence_parallel or _is_trained(input, weight)):
            # The base that follows in a layer's bases is core's.
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return differentiable_linear(input, weight, kwargs["bias"])


class OPTColumnParallelLinear(PackableLinear, ColumnParallelLinear):
    """x A^T + b with the rows of A divided over the tensor parallel ranks; the bias is always added here.

    Args:
        method: stores the weight while loading, if it defers weights; `prepare_inference` is given one too.
    """

    def __init__(self, *args: Any, method: type[LinearMethod] = TorchLinear, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"skip_bias_add": False}))
        self.method = method
        if method.loads_deferred:  # here, so that the layers' float weights are never held together
            self.defer_weight()

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs] -> [s, b, outputs of this rank], and no bias"""
        if self.packed is not None:
            return self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2]), None
        return super().forward(input_, *args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.sequence_parallel or _is_trained(input, weight):
            return super()._forward_impl(input, weight, *args, **kwargs)
        return linear(input, weight, kwargs["bias"])


class OPTRowParallelLinear(PackableLinear, RowParallelLinear):
    """x A^T + b with the columns of A divided; the partial products are summed over the ranks.

    Args:
        method: as of OPTColumnParallelLinear.

    Attributes:
        skip_zeros: inputs follow ReLU, and the weights of those that are zero need not be read.
    """

    skip_zeros: bool = False

    def __init__(self, *args: Any, method: type[LinearMethod] = TorchLinear, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        if method.loads_deferred:
            self.defer_weight()
        self._adds_bias = self.tp_group.rank() == 0  # once in the sum

    def infer(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """[T, inputs of this rank] -> this rank's part [T, outputs] of the sum; after `prepare_inference`.

        Bias and residual are in the first rank's part, so that the sum over the ranks has them once.
        """
        packed = self.packed
        assert packed is not None and not relu, "ReLU of a part is not a part of the sum's"
        if not self._adds_bias:
            return packed(x, None, skip_zeros=self.skip_zeros)
        return packed(x, self.bias, residual=residual, skip_zeros=self.skip_zeros)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs of this rank] -> [s, b, outputs], and the bias where core leaves it to the caller"""
        if self.packed is not None:
            partial = self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2])
        elif self.sequence_parallel or _is_trained(input_, self.float_weight()):
            return super().forward(input_)
        else:
            partial = linear(input_, self.float_weight(), self.bias if self._adds_bias else None)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None


class OPTOutputLayer(PackableLinear, ColumnParallelLinear):
    """The head [V, h] that is tied to the embedding: hidden states -> logits of this rank's vocabulary rows.

    On a rank that has the embedding too, it has no weight, and is prepared with the embedding's.

    Args:
        num_logits: rows of the vocabulary, of all ranks; those that pad it give -inf, or are cut off once gathered.
        method: as of OPTColumnParallelLinear; the model defers the weight after it has tied it.
    """

    output_size_per_partition: int

    def __init__(self, *args: Any, num_logits: int, method: type[LinearMethod] = TorchLinear, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method.head_method or method
        self._num_logits = num_logits
        self._first_padding = max(0, num_logits - self.tp_group.rank() * self.output_size_per_partition)

    def prepare_tied(self, weight: Tensor, method: type[LinearMethod]) -> None:
        """As `prepare_inference`, with the embedding's `weight` [V, h]."""
        self._pack(weight, method.head_method or method)

    def infer(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """[T, hidden] -> [T, vocabulary rows of this rank]"""
        return self._mask_padding(super().infer(x, residual, relu=relu))

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> [s, b, vocabulary rows], gathered if core asks for that"""
        runtime = kwargs.get("runtime_gather_output")
        gather = self.gather_output if runtime is None else runtime
        if self.packed is None:
            logits, _ = super().forward(input_, *args, **kwargs)
        else:
            logits = self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2])
            logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group) if gather else logits
        return (logits[..., : self._num_logits] if gather else self._mask_padding(logits)), None

    def _mask_padding(self, logits: Tensor) -> Tensor:
        """This rank's logits, with -inf written into those of padding."""
        if self._first_padding < logits.size(-1):
            logits[..., self._first_padding :] = -torch.inf
        return logits
