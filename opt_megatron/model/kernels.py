"""Matrix products: x A^T with what follows it (bias, ReLU, residual) in as few calls as there are.

Three kinds for inference, chosen by `pack`:

    Plain   torch's linear, on any device and dtype
    Packed  oneDNN's, with the weight in its blocked order: on CPUs. On an AMD processor it read a 125m's
            weights at the speed of memory where torch's linear took 3.5 times as long, at any batch size.
    Int8    oneDNN's 8-bit product, weights by output channel and activations by token; weight-only on CUDA

and `differentiable_product` for training, which is oneDNN's on a CPU in all three directions: torch's own
(MKL) ran at 40 to 117 GFLOP/s a core where oneDNN's ran at 150 to 257.

T = tokens of the step (any number), I = inputs, O = outputs, both of this tensor parallel rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

_PACK_FOR = 16  # tokens a step that the blocked order is chosen for: good from 1 to 512 where it was measured


class Product(Protocol):
    """x A^T + bias + residual, or relu(x A^T + bias). [T, I] -> [T, O]"""

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """`relu` and `residual` exclude each other."""


class Plain:
    """torch.nn.functional.linear; `weight` [O, I] stays what and where it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        return _finish(linear(x, self.weight, bias), relu, residual)


class Packed:
    """oneDNN's product with a weight in its own order, and the rest fused into it.

    The operators are those that torch's own compiler emits for frozen weights (torch/_inductor, mkldnn fusion).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR)

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Whether this torch and processor have it for the weight's device and dtype."""
        mkldnn = torch.ops.mkldnn
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if not hasattr(mkldnn, "_reorder_linear_weight") or not hasattr(mkldnn, "_linear_pointwise"):
            return False
        supported = {
            torch.float32: lambda: True,
            torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
            torch.float16: mkldnn._is_mkldnn_fp16_supported,
        }
        return weight.dtype in supported and supported[weight.dtype]()

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, bias, "relu" if relu else "none", [], "")


class _DifferentiableProduct(torch.autograd.Function):
    """x A^T + b by oneDNN, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, I] -> [T, O]"""
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x [T, I], of the weight [O, I] and of the bias [O], those that are needed."""
        x, weight = ctx.saved_tensors
        of_x = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        of_weight = _transposed_product(gradient, x) if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def differentiable_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x A^T + b for training. [..., I] -> [..., O]"""
    if not Packed.supports(weight):
        return linear(x, weight, bias)
    # In two dimensions: the operator would hand out a view, which autograd lets nobody change in place.
    return _DifferentiableProduct.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for a [T, O] and b [T, I]. The wider of the two goes second: measured to be up to half as fast again."""
    if a.size(1) > b.size(1):
        return _product(b.t(), a.t(), None).t()
    return _product(a.t(), b.t(), None)


class Int8:
    """8-bit weights with a scale for each output channel, 8-bit activations with a scale for each token.

    The token's own scale, and not one of the whole batch as torch's dynamic linear takes it, so that a
    request's result does not depend on what else is in the batch. Symmetric: weight = round(w / max|w| * 127)
    by row, and activations likewise by token; with half as many steps where the processor adds pairs of
    products in 16 bits, which could overflow.
    """

    def __init__(self, weight: Tensor) -> None:
        quantized, scales = quantize_rows(weight)
        self._channels = scales.float()
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._levels = 127 if _adds_in_32_bits() else 63
        self._offset = torch.tensor(self._levels + 1.5)

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        largest = x.abs().amax(-1, keepdim=True)  # [T, 1]
        # zero point + x / largest * levels; adding a half and cutting off rounds to the nearest (in float32: in half
        # precision there is no half beside 128). A row of zeros divides by zero, gives any 8-bit numbers, and is
        # multiplied by zero below.
        quantized = torch.addcdiv(self._offset, x.float(), largest.float(), value=self._levels).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise.default(
            quantized, 1 / self._levels, self._levels + 1, self._weight, self._channels, self._zeros,
            None, 1.0, 0, x.dtype, "none", [], "",
        )  # fmt: skip
        output = product.mul_(largest) if bias is None else torch.addcmul(bias, product, largest)
        return _finish(output, relu, residual)


class Int8WeightOnly:
    """CUDA: 8-bit weights that become the activations' dtype before the product. Not yet run on a GPU."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._channels = quantize_rows(weight)

    def __call__(self, x: Tensor, bias: Tensor | None, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """[T, I] -> [T, O]"""
        output = linear(x, self._weight.to(x.dtype)) * self._channels.to(x.dtype)
        return _finish(output if bias is None else output + bias, relu, residual)


def pack(weight: Tensor) -> Product:
    """The fastest exact product for the weight [O, I]. A `Packed` one does not refer to it afterwards."""
    return Packed(weight.detach()) if Packed.supports(weight) else Plain(weight.detach())


def quantize(weight: Tensor) -> Product:
    """An 8-bit product for the weight [O, I], which it does not refer to afterwards."""
    return Int8(weight) if weight.device.type == "cpu" else Int8WeightOnly(weight)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and scales [O] with weight ~ int8 * scale: symmetric, to the nearest, by row."""
    scales = weight.abs().amax(1).float().clamp_(min=1e-12).div_(127)
    # In float32: bfloat16 has no 127.4, and 128 is no int8.
    return (weight.float() / scales[:, None]).round_().to(torch.int8), scales


def _finish(output: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    if relu:
        return output.relu_()
    return output if residual is None else output.add_(residual)


def _adds_in_32_bits() -> bool:
    return torch.cpu._is_vnni_supported()
