"""Keys and values of many sequences in one memory, and attention over them, on a CPU.

Decoding is computed by the kernels of csrc/ (`CPUKernelAttention`), or where they were not compiled by
`EmbeddingBagAttention`; pieces of prompts by torch's kernel.

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

from ...model.cpu_kernels import library
from ..step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence
from .cpu_cache_blocks import CPUCacheBlocks
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


class CPUKVCache:
    """The cache of one model on this rank, and the attention over it (`kv_cache.KVCache`).

    Args:
        num_layers: L.
        num_heads: n.
        num_tokens: C, a multiple of BLOCK_SIZE.
        dtype: of the cache; other ones than float32 need the kernels of csrc/.
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
        self._blocks = CPUCacheBlocks.allocate(num_layers, num_heads, head_dim, num_tokens, dtype)
        self._layers = self._blocks.layers()

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
        return self._attend(query_key_value.float(), self._layers[layer]).to(query_key_value.dtype)

    def _attend(self, query_key_value: Tensor, cache: CPUCacheBlocks) -> Tensor:
        single = self._single
        if single is not None and not self._pieces:
            return single.attend(query_key_value, cache.all, self._scale)
        output = query_key_value.new_empty(query_key_value.size(0), self._width)
        for piece in self._pieces:
            output[piece.tokens] = self._attend_piece(piece, query_key_value[piece.tokens], cache)
        if single is not None:
            output[single.tokens] = single.attend(query_key_value[single.tokens], cache.all, self._scale)
        return output

    def _attend_piece(self, piece: _PromptPiece, query_key_value: Tensor, cache: CPUCacheBlocks) -> Tensor:
        """Torch's attention kernel, which takes keys and values as [n, t, d]."""
        query, key, value = query_key_value.permute(2, 1, 0, 3)  # [n, queries, d]
        blocks, position, tokens, *_ = piece.sequence
        cache.store(blocks, position, key, value)
        if position > 0:
            key, value = cache.gather(blocks, position + len(tokens))
        output = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=piece.mask,
            is_causal=piece.mask is None,
            scale=self._scale,
        )
        return output[0].transpose(0, 1).reshape(-1, self._width)

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """See KVCache."""
        self._blocks.copy(source, target, begin, end)
