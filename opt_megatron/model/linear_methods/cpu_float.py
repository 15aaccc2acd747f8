"""Float weights on a CPU, by the kernels of csrc/: in the checkpoint's dtype, with float32 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..cpu_kernels import FORMATS, TILE, TiledWeight, empty_in_huge_pages, in_tiles, library
from .base import EmbeddingRows, LinearMethod, apply_epilogue

_MANY_TOKENS = 512  # as many as only evaluation and long prompts have: torch's products are a third faster from here on
_TILES_AT_ONCE = 8
_OUTPUTS_AT_ONCE = _TILES_AT_ONCE * TILE


class CPUFloatRows(EmbeddingRows):
    """An embedding's table in the checkpoint's dtype, whose rows become float32."""

    def __init__(self, weight: Tensor) -> None:
        self._table = empty_in_huge_pages(tuple(weight.shape), weight.dtype).copy_(weight)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """[...] -> [..., W]"""
        return embedding(ids, self._table).float()

    def table(self) -> Tensor:
        """[V, W], in the checkpoint's dtype."""
        return self._table


class CPUFloatLinear(LinearMethod):
    """A float32, float16 or bfloat16 weight, and float32 activations.

    A 16-bit weight becomes float32 in the registers, so the result is that of the float32 weight, at half the bytes.
    Where most of a few tokens' activations are zero (as of fc2 after ReLU), their weights are not read.
    """

    @classmethod
    def is_available(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """On a CPU, for float32 activations, where the kernels were compiled."""
        return device.type == "cpu" and dtype == torch.float32 and library() is not None

    def __init__(self, weight: Tensor) -> None:
        tiles = in_tiles(weight).transpose(1, 2)  # [tiles, I, 64]
        values = empty_in_huge_pages(tuple(tiles.shape), weight.dtype).copy_(tiles)
        self._weight = TiledWeight(FORMATS[weight.dtype], (weight.shape[0], weight.shape[1]), values)

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
        if len(x) >= _MANY_TOKENS:
            return self._multiply_many(x, bias, relu, residual)
        return self._weight.multiply(x, bias, relu=relu, residual=residual, skip_zeros=skip_zeros)

    def _multiply_many(self, x: Tensor, bias: Tensor | None, relu: bool, residual: Tensor | None) -> Tensor:
        """By torch's product, with some tiles at a time as an ordinary float32 matrix."""
        num_outputs, num_inputs = self._weight.shape
        output = x.new_empty(len(x), num_outputs)
        for first, tiles in enumerate(self._weight.values.split(_TILES_AT_ONCE)):
            columns = slice(first * _OUTPUTS_AT_ONCE, min((first + 1) * _OUTPUTS_AT_ONCE, num_outputs))
            weight = torch.empty(num_inputs, len(tiles), TILE, dtype=x.dtype).copy_(tiles.transpose(0, 1)).flatten(1)
            weight, product = weight[:, : columns.stop - columns.start], output[:, columns]
            if bias is None:
                torch.mm(x, weight, out=product)
            else:
                torch.addmm(bias[columns].to(x.dtype), x, weight, out=product)
        return apply_epilogue(output, relu, residual)

    def unpack(self) -> Tensor:
        """The weight in its ordinary order, a new tensor."""
        return self._weight.values.transpose(1, 2).flatten(0, 1)[: self._weight.shape[0]].clone()


class CPUFloat16Linear(CPUFloatLinear):
    """A checkpoint's float16 weight."""

    loads_deferred = True
    weight_dtype = torch.float16
    embedding_rows = CPUFloatRows


class CPUBFloat16Linear(CPUFloatLinear):
    """A checkpoint's bfloat16 weight."""

    loads_deferred = True
    weight_dtype = torch.bfloat16
    embedding_rows = CPUFloatRows
