"""The memory of a CPU's KV cache: keys and values in blocks of 64 tokens, as floats or in 8 bits.

Within a block heads come first, keys as [n, d, 64] and values as [n, 64, d], so that scores and outputs of attention
are sums of whole vectors. In 8 bits each token's key and value of a head has a scale of its own.

L = layers of this pipeline stage, C = tokens of the cache, n = attention heads of this tensor parallel rank,
d = head_dim, t = tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...model.cpu_kernels import CachedKeysValues, empty_in_huge_pages
from ..step import BLOCK_SIZE, KVCacheBlocks


class CPUCacheBlocks:
    """Keys and values of all layers, or of one (`layers`).

    Args:
        numbers: [..., 2, C * n * d], keys and values.
        scales: float32 [..., 2, C * n] of int8.

    Attributes:
        all: every block, with one dimension for blocks and what is in them.
    """

    def __init__(self, numbers: Tensor, scales: Tensor | None, num_heads: int, head_dim: int) -> None:
        self._numbers, self._scales = numbers, scales
        self._num_heads, self._head_dim = num_heads, head_dim
        self.all = CachedKeysValues(*numbers.unbind(-2), *(() if scales is None else scales.unbind(-2)))

    @classmethod
    def allocate(
        cls, num_layers: int, num_heads: int, head_dim: int, num_tokens: int, dtype: torch.dtype
    ) -> CPUCacheBlocks:
        """Memory for C = `num_tokens`. The operating system provides its pages when they are first written."""
        numbers = empty_in_huge_pages((num_layers, 2, num_tokens * num_heads * head_dim), dtype)
        scales = torch.empty(num_layers, 2, num_tokens * num_heads) if dtype == torch.int8 else None
        return cls(numbers, scales, num_heads, head_dim)

    def layers(self) -> list[CPUCacheBlocks]:
        """Each layer's part, of the same memory."""
        scales = [None] * len(self._numbers) if self._scales is None else self._scales.unbind()
        pairs = zip(self._numbers.unbind(), scales, strict=True)
        return [CPUCacheBlocks(*pair, self._num_heads, self._head_dim) for pair in pairs]

    def store(self, blocks: KVCacheBlocks, position: int, key: Tensor, value: Tensor) -> None:
        """Write keys and values [n, t, d] of one layer from a position of the sequence with these blocks."""
        stored = self._stored(key.transpose(1, 2), value.transpose(1, 2))
        targets = self._blocks_of(blocks)
        done, count = 0, key.size(1)
        while done < count:
            block, offset = divmod(position + done, BLOCK_SIZE)
            size = min(BLOCK_SIZE - offset, count - done)
            for target, numbers in zip(targets, stored, strict=True):
                target[block, ..., offset : offset + size] = numbers[..., done : done + size]
            done += size

    def _stored(self, key: Tensor, value: Tensor) -> list[Tensor]:
        """What is kept of [n, d, t]: in 8 bits numbers and scales."""
        if self._scales is None:
            return [key, value]
        (key, key_scales), (value, value_scales) = _in_8_bits(key), _in_8_bits(value)
        return [key, value, key_scales, value_scales]

    def gather(self, blocks: KVCacheBlocks, end: int) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values of one layer's sequence, each float32 [n, end, d]."""
        count = -(-end // BLOCK_SIZE)
        keys, values, *scales = (each[:count].float() for each in self._blocks_of(blocks))
        if scales:
            keys, values = keys * scales[0][:, :, None], values * scales[1][:, :, None]
        key, value = (each.permute(1, 0, 3, 2).flatten(1, 2)[:, :end] for each in (keys, values))
        return key, value

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of a sequence to another's blocks, in all layers."""
        pairs = list(zip(self._blocks_of(source), self._blocks_of(target), strict=True))
        for block in range(begin // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            inside = slice(max(begin - block * BLOCK_SIZE, 0), min(end - block * BLOCK_SIZE, BLOCK_SIZE))
            for from_, to in pairs:
                to[:, block, ..., inside] = from_[:, block, ..., inside]

    def _blocks_of(self, blocks: KVCacheBlocks) -> list[Tensor]:
        """A sequence's keys and values as [..., blocks, n, d, 64], and their scales as [..., blocks, n, 64]."""
        n, d = self._num_heads, self._head_dim
        keys, values, *scales = (each for each in self.all if each is not None)
        of_keys = _cut(keys, blocks, (n, d, BLOCK_SIZE))
        of_values = _cut(values, blocks, (n, BLOCK_SIZE, d)).transpose(-1, -2)
        return [of_keys, of_values, *(_cut(each, blocks, (n, BLOCK_SIZE)) for each in scales)]


def _cut(every: Tensor, blocks: KVCacheBlocks, shape: tuple[int, ...]) -> Tensor:
    """[..., numbers of all blocks] -> [..., blocks, *shape]"""
    size, first, count = math.prod(shape), blocks.start // BLOCK_SIZE, blocks.size // BLOCK_SIZE
    return every.narrow(-1, first * size, count * size).unflatten(-1, (count, *shape))


def _in_8_bits(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """[n, d, t] -> int8 and the scales [n, t], as the kernel of csrc/attention.cpp rounds."""
    largest = vectors.abs().amax(1)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    scaled = (vectors * inverse[:, None]).nan_to_num(0, 0, 0)
    return (scaled + torch.copysign(torch.tensor(0.5), scaled)).to(torch.int8), largest / 127 + (vectors * 0).sum(1)
