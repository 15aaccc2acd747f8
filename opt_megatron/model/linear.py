"""Megatron's parallel linear layers with OPT's inference: one call a product, packed or 8-bit weights.

Core adds the bias in a step of its own and wraps the product in an autograd function. In inference that
costs time, and it rounds differently from torch's `linear`: with these, an fp32 OPT on one tensor parallel
rank gives transformers' logits to the bit. Where gradients are needed, the products are core's on a GPU and
oneDNN's on a CPU (kernels.py), with core's collectives around them.

`prepare_inference` exchanges the weight for a `Product` (kernels.py), which is what decoding uses; the Int8
classes, which a spec puts in the places of the others, never hold anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

from .kernels import Plain, Product, differentiable_product, pack, quantize


def _is_trained(x: Tensor, weight: Tensor) -> bool:
    """Whether the model is being trained (or validated in between), rather than run."""
    return weight.requires_grad or (torch.is_grad_enabled() and x.requires_grad)


class _TrainedProduct(nn.Module):
    """Exchanges the product inside core's parallel linear layers for `differentiable_product` on a CPU."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weight.device.type != "cpu" or not (self.sequence_parallel or _is_trained(input, weight)):
            return super()._forward_impl(input, weight, *args, **kwargs)
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return differentiable_product(input, weight, kwargs["bias"])


class _WithProduct(_TrainedProduct):
    """A layer that has a weight, or a product in its place.

    Attributes:
        product: what computes in inference; None while the weight is an ordinary parameter.
    """

    product: Product | None = None

    def prepare_inference(self) -> None:
        """Make the product, and let go of a weight that it has no more use for."""
        if self.product is None:
            self.product = pack(self.weight)
            if not isinstance(self.product, Plain):
                self.register_parameter("weight", None)


class OPTColumnParallelLinear(_WithProduct, ColumnParallelLinear):
    """x A^T + b with the rows of A divided over the tensor parallel ranks; the bias is always added here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"skip_bias_add": False}))

    def infer(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """[T, inputs] -> [T, outputs of this rank]; after `prepare_inference`."""
        return self.product(x, self.bias, relu=relu)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs] -> [s, b, outputs of this rank], and no bias"""
        if self.product is not None:
            return self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2]), None
        return super().forward(input_, *args, **kwargs)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.sequence_parallel or _is_trained(input, weight):
            return super()._forward_impl(input, weight, *args, **kwargs)
        return linear(input, weight, kwargs["bias"])


class OPTRowParallelLinear(_WithProduct, RowParallelLinear):
    """x A^T + b with the columns of A divided; the partial products are summed over the ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adds_bias = self.tp_group.rank() == 0  # once in the sum

    def infer(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[T, inputs of this rank] -> this rank's part [T, outputs] of the sum; after `prepare_inference`.

        Bias and residual are in the first rank's part, so that the sum over the ranks has them once.
        """
        return self.product(x, self.bias, residual=residual) if self._adds_bias else self.product(x, None)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs of this rank] -> [s, b, outputs], and the bias where core leaves it to the caller"""
        if self.product is not None:
            partial = self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2])
        elif self.sequence_parallel or _is_trained(input_, self.weight):
            return super().forward(input_)
        else:
            partial = linear(input_, self.weight, self.bias if self._adds_bias else None)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None


class OPTOutputLayer(_WithProduct, ColumnParallelLinear):
    """The head [V, h] that is tied to the embedding: hidden states -> logits of this rank's vocabulary rows.

    Where it has no weight of its own (embedding and head on one rank), `prepare_inference` takes the embedding's.
    """

    def prepare_head(self, weight: Tensor, *, quantized: bool) -> None:
        """Make the product of `weight` [V, h]; the head's own one, if it has one, is let go."""
        self.product = quantize(weight) if quantized else pack(weight)
        if self.weight is not None and not isinstance(self.product, Plain):
            self.register_parameter("weight", None)

    def infer(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocabulary rows of this rank]; after `prepare_head`."""
        return self.product(hidden, None)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> [s, b, vocabulary rows], gathered where core is told to"""
        if self.product is None:
            return super().forward(input_, *args, **kwargs)
        logits = self.infer(input_.flatten(0, 1)).unflatten(0, input_.shape[:2])
        gather = kwargs.get("runtime_gather_output")
        if self.gather_output if gather is None else gather:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return logits, None


class DeferredWeight(nn.Module):
    """A module whose `weight` is a name and a shape until `take_weight` is given the values.

    For 8-bit layers: the float weight is never allocated for the whole model, only for one tensor at a time.
    """

    def defer_weight(self) -> None:
        """Let go of the weight's memory."""
        self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)

    def take_weight(self, weight: Tensor) -> None:
        """Keep what is needed of `weight`, which has the shape and dtype of the parameter."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight = self._parameters.pop("weight")  # has no memory that could be moved or cast
        result = super()._apply(fn, recurse)
        self._parameters["weight"] = weight
        return result


class _Int8Weight(DeferredWeight):
    """Keeps an 8-bit product."""

    def take_weight(self, weight: Tensor) -> None:
        """Quantise by row: an output channel, or an entry of the vocabulary."""
        self.product = quantize(weight)


class _Int8Linear(_Int8Weight):
    """A layer's: deferred as soon as it is made, so that the layers' float weights never stand beside each other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defer_weight()


class Int8ColumnParallelLinear(_Int8Linear, OPTColumnParallelLinear):
    """OPTColumnParallelLinear with 8-bit weights, for inference."""


class Int8RowParallelLinear(_Int8Linear, OPTRowParallelLinear):
    """OPTRowParallelLinear with 8-bit weights, for inference."""


class Int8OutputLayer(_Int8Weight, OPTOutputLayer):
    """The head of a pipeline stage that has no embedding, with 8-bit weights."""
