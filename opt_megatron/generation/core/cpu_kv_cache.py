"""Keys and values of many sequences in one memory, and attention over them, on a CPU.

A block holds 64 tokens. Within a block heads come first, keys as [n, d, 64] and values as [n, 64, d], so that scores
and outputs are sums of whole vectors. Decoding is computed by the kernels of csrc/ (`CPUKernelAttention`), or where
they were not compiled by `EmbeddingBagAttention`; pieces of prompts by torch's kernel.

Without csrc/ the cache is in float32 for models in half precision too: torch sums rows of 16-bit numbers an order
slower, and a step of 16 bfloat16 sequences of 400 tokens took three times as long.

T = tokens of the step, C = tokens of the cache, L = layers of this pipeline stage, n = attention heads of
this tensor parallel rank, d = head_dim, t = keys that a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...model.cpu_kernels import FORMATS, empty_in_huge_pages, library
from ..step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence
from .cpu_kernel_attention import CPUKernelAttention
from .embedding_bag_attention import EmbeddingBagAttention

_MAX_SINGLE_QUERIES = 8  # a sequence with at most this many tokens in a step is computed as single queries


@dataclass(frozen=True)
class _PromptPiece:
    """Many tokens of one sequence.

    Attributes:
        tokens: their indices among the step's tokens.
        mask: bool [queries, t], True where a query sees a key; None for a piece that begins its sequence.
    """

    tokens: slice
    sequence: ScheduledSequence
    mask: Tensor | None


def cache_dtype(dtype: torch.dtype) -> torch.dtype:
    """The cache's dtype for a model of `dtype`."""
    return dtype if library() is not None and dtype in FORMATS else torch.float32


class CPUKVCache:
    """The cache of one model on this rank, and the attention over it (`kv_cache.KVCache`).

    Args:
        num_layers: L.
        num_heads: n.
        num_tokens: C, a multiple of BLOCK_SIZE.
        dtype: of the cache, as `cache_dtype` says.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_tokens: int,
        *,
        dtype: torch.dtype,
    ) -> None:
        self.num_tokens = num_tokens
        self._num_heads, self._head_dim = num_heads, head_dim
        self._width = num_heads * head_dim
        self._scale = head_dim**-0.5
        # The operating system provides its pages when they are first written.
        self._memory = empty_in_huge_pages((num_layers, 2, num_tokens * self._width), dtype)
        self._layers = list(self._memory.unbind())

    def prepare_step(self, sequences: tuple[ScheduledSequence, ...]) -> Tensor:
        """See KVCache."""
        self._pieces: list[_PromptPiece] = []
        queries: list[tuple[int, int, int]] = []  # index among the step's tokens, first block, position
        positions: list[int] = []
        for sequence in sequences:
            first, position, count = len(positions), sequence.position, len(sequence.tokens)
            if count <= _MAX_SINGLE_QUERIES:
                block = sequence.blocks.start // BLOCK_SIZE
                queries += [(first + i, block, position + i) for i in range(count)]
            else:
                mask = self._causal_mask(position, count)
                self._pieces.append(_PromptPiece(slice(first, first + count), sequence, mask))
            positions += range(position, position + count)
        self._single = self._single_queries(queries) if queries else None
        return torch.tensor(positions)

    def _single_queries(self, queries: list[tuple[int, int, int]]) -> CPUKernelAttention | EmbeddingBagAttention:
        kernels = library()
        if kernels is not None:
            return CPUKernelAttention(queries, kernels)
        return EmbeddingBagAttention(queries, self._num_heads, self._head_dim)

    def _causal_mask(self, position: int, count: int) -> Tensor | None:
        if position == 0:  # is simply causal
            return None
        every = torch.ones(count, position + count, dtype=torch.bool)
        return every.tril(position)

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """See KVCache."""
        return self._attend(query_key_value.float(), *self._layers[layer]).to(query_key_value.dtype)

    def _attend(self, query_key_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        single = self._single
        if single is not None and not self._pieces:
            return single.attend(query_key_value, keys, values, self._scale)
        output = query_key_value.new_empty(query_key_value.size(0), self._width)
        for piece in self._pieces:
            output[piece.tokens] = self._attend_piece(piece, query_key_value[piece.tokens], keys, values)
        if single is not None:
            output[single.tokens] = single.attend(query_key_value[single.tokens], keys, values, self._scale)
        return output

    def _attend_piece(self, piece: _PromptPiece, query_key_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Torch's attention kernel, which takes keys and values as [n, t, d]."""
        query, key, value = query_key_value.permute(2, 1, 0, 3)  # [n, queries, d]
        blocks, position, tokens, *_ = piece.sequence
        self._store(blocks, position, key, value, keys, values)
        if position > 0:
            key, value = (
                cached.to(query.dtype) for cached in self._gather(blocks, position + len(tokens), keys, values)
            )
        output = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            scale=self._scale,
        )
        return output[0].transpose(0, 1).reshape(-1, self._width)

    def _store(
        self, blocks: KVCacheBlocks, position: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        key_blocks, value_blocks = self._in_blocks(blocks, keys, values)
        done, count = 0, key.size(1)
        while done < count:
            block, offset = divmod(position + done, BLOCK_SIZE)
            size = min(BLOCK_SIZE - offset, count - done)
            key_blocks[block, :, :, offset : offset + size] = key[:, done : done + size].transpose(1, 2)
            value_blocks[block, :, offset : offset + size] = value[:, done : done + size]
            done += size

    def _gather(self, blocks: KVCacheBlocks, end: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values of a sequence, [n, end, d]."""
        count = -(-end // BLOCK_SIZE)
        key_blocks, value_blocks = (every[:count] for every in self._in_blocks(blocks, keys, values))
        return (
            key_blocks.permute(1, 0, 3, 2).reshape(self._num_heads, count * BLOCK_SIZE, self._head_dim)[:, :end],
            value_blocks.transpose(0, 1).reshape(self._num_heads, count * BLOCK_SIZE, self._head_dim)[:, :end],
        )

    def _in_blocks(self, blocks: KVCacheBlocks, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[..., blocks, n, d, 64] and [..., blocks, n, 64, d] of memory [..., C * n * d]"""
        begin, length = blocks.start * self._width, blocks.size * self._width
        n, d, count = self._num_heads, self._head_dim, blocks.size // BLOCK_SIZE
        return (
            keys.narrow(-1, begin, length).unflatten(-1, (count, n, d, BLOCK_SIZE)),
            values.narrow(-1, begin, length).unflatten(-1, (count, n, BLOCK_SIZE, d)),
        )

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """See KVCache."""
        keys, values = self._memory.unbind(1)
        from_keys, from_values = self._in_blocks(source, keys, values)
        to_keys, to_values = self._in_blocks(target, keys, values)
        for block in range(begin // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            inside = slice(max(begin - block * BLOCK_SIZE, 0), min(end - block * BLOCK_SIZE, BLOCK_SIZE))
            to_keys[:, block, :, :, inside] = from_keys[:, block, :, :, inside]
            to_values[:, block, :, inside] = from_values[:, block, :, inside]
