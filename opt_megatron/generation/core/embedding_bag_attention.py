"""Attention of single queries over the KV cache as weighted sums of rows, on a CPU.

With keys stored as [n, d, 64] a block and values as [n, 64, d], what attention of one query needs are weighted sums of
rows: the scores of a block are the sum of its d rows of keys weighted by the query, the output is the sum of rows of
values weighted by the probabilities. Torch's `embedding_bag` computes such sums, of any number of rows each, at the
speed of memory: all queries of a step in two calls a layer, whatever the lengths of their sequences, without padding.
(Batched matrix products of one query over the same memory took 1.6 times as long, and one call for each sequence.)

Q = queries of a step, n = attention heads of this rank, d = head_dim, t = keys that a query sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.cpu_kernels import CachedKeysValues
from ..step import BLOCK_SIZE


class EmbeddingBagAttention:
    """The queries of one step, each of which is the newest token, or one of the newest few, of its sequence.

    A bag of keys is a block of one head and query: d rows of 64 scores. A bag of values is a head of a query:
    t rows of d. The indices are made once a step and used by all layers.

    Args:
        queries: (index among the step's tokens, first block of the sequence, position in the sequence) of each.

    Attributes:
        tokens: [Q], indices among the step's tokens.
    """

    def __init__(self, queries: list[tuple[int, int, int]], n: int, d: int) -> None:
        self.tokens, first_blocks, positions = torch.tensor(queries).unbind(1)  # [Q]
        self._n, self._d = n, d
        lengths = positions + 1
        heads = torch.arange(n)
        newest = first_blocks + positions // BLOCK_SIZE
        block_heads = newest[:, None] * n + heads  # [Q, n]: block and head
        offset = (positions % BLOCK_SIZE)[:, None]
        self._value_slots = (block_heads * BLOCK_SIZE + offset).view(-1)
        self._key_slots = ((block_heads[..., None] * d + torch.arange(d)) * BLOCK_SIZE + offset[..., None]).view(-1)
        self._index_keys(first_blocks, lengths, heads)
        self._index_values(first_blocks, lengths, heads)

    def _index_keys(self, first_blocks: Tensor, lengths: Tensor, heads: Tensor) -> None:
        counts = -(-lengths // BLOCK_SIZE)  # blocks of each query
        self._width = int(counts.max()) * BLOCK_SIZE
        blocks = torch.arange(self._width // BLOCK_SIZE)
        is_valid = (blocks < counts[:, None])[:, None].expand(-1, self._n, -1)  # [Q, n, most blocks]
        block_heads = (first_blocks[:, None] + blocks)[:, None] * self._n + heads[:, None]  # [Q, n, most blocks]
        self._bag_indices: Tensor | None = None
        if not is_valid.all():
            block_heads = block_heads[is_valid]
            self._bag_indices = is_valid.reshape(-1).nonzero()[:, 0]  # bags, among [Q, n, most blocks]
            self._bag_queries = self._bag_indices // len(blocks)  # bags, among [Q, n]
        self._key_rows = (block_heads.reshape(-1, 1) * self._d + torch.arange(self._d)).view(-1).int()
        self._key_offsets = torch.arange(0, self._key_rows.numel() + 1, self._d, dtype=torch.int32)

    def _index_values(self, first_blocks: Tensor, lengths: Tensor, heads: Tensor) -> None:
        # If all lengths are equal, a slice of the scores replaces a mask and a selection.
        self._length = int(lengths[0]) if bool((lengths == lengths[0]).all()) else None
        positions = torch.arange(self._width if self._length is None else self._length)
        blocks = first_blocks[:, None] + positions // BLOCK_SIZE  # [Q, most]
        rows = blocks * (self._n * BLOCK_SIZE) + positions % BLOCK_SIZE  # [Q, most]
        rows = (rows[:, None] + heads[:, None] * BLOCK_SIZE).reshape(-1)  # [Q * n * most]
        if self._length is None:
            is_valid = (positions < lengths[:, None])[:, None]  # [Q, 1, most]
            self._invalid = ~is_valid
            self._weights = is_valid.expand(-1, self._n, -1).reshape(-1).nonzero()[:, 0]
            rows = rows[self._weights]
        self._value_rows = rows.int()
        offsets = torch.zeros(lengths.numel() * self._n + 1, dtype=torch.int32)
        offsets[1:] = lengths.repeat_interleave(self._n).cumsum(0)
        self._value_offsets = offsets

    def attend(self, query_key_value: Tensor, cache: CachedKeysValues, scale: float) -> Tensor:
        """Store and attend: [Q, n, 3, d] -> [Q, n * d]."""
        n, d = self._n, self._d
        keys, values = cache.keys, cache.values
        query, key, value = query_key_value.unbind(2)
        value_rows = values.view(-1, d)
        keys.index_copy_(0, self._key_slots, key.reshape(-1))
        value_rows.index_copy_(0, self._value_slots, value.reshape(-1, d))
        scores = self._scores((query * scale).view(-1, d), keys.view(-1, BLOCK_SIZE)).view(-1, n, self._width)
        if self._length is not None:
            probabilities = scores[:, :, : self._length].softmax(-1).view(-1)
        else:  # masked instead of adding -inf: memory that was never written may hold NaN
            probabilities = scores.masked_fill(self._invalid, -torch.inf).softmax(-1).view(-1)
            probabilities = probabilities.index_select(0, self._weights)
        return self._sum_bags(value_rows, self._value_rows, self._value_offsets, probabilities).view(-1, n * d)

    def _scores(self, queries: Tensor, key_rows: Tensor) -> Tensor:
        """[Q * n, d] -> [Q * n, most blocks, 64]"""
        blocks = self._width // BLOCK_SIZE
        if self._bag_indices is None:
            weights = queries[:, None].expand(-1, blocks, -1).reshape(-1)
            return self._sum_bags(key_rows, self._key_rows, self._key_offsets, weights)
        weights = queries.index_select(0, self._bag_queries).view(-1)
        sums = self._sum_bags(key_rows, self._key_rows, self._key_offsets, weights)
        scores = queries.new_empty(queries.size(0) * blocks, BLOCK_SIZE)
        return scores.index_copy_(0, self._bag_indices, sums)

    @staticmethod
    def _sum_bags(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Sums of weighted rows of `table`: bag i is `rows[offsets[i]:offsets[i + 1]]`."""
        return torch.embedding_bag(table, rows, offsets, False, 0, False, weights, True)[0]
