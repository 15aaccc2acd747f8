"""Keys and values of many sequences in one memory, and attention over them.

A sequence owns an extent of the cache, as many tokens as it can ever need. Nothing outside its own tokens has
an influence on it: memory need not be cleared, and a sequence is shortened by writing over its end.

Memory is divided into blocks of 64 tokens. Within a block heads come first, keys as [n, d, 64] and values as
[n, 64, d]. So what attention of one query needs are weighted sums of rows: the scores of a block are the sum
of its d rows of keys with the query as weights, the output is the sum of rows of values with the
probabilities as weights. On a CPU torch's `embedding_bag` makes such sums, of any number of rows each, at the
speed of memory: all queries of a step in two calls a layer, whatever the lengths of their sequences, without
padding. (Batched products of one query over the same memory took 1.6 times as long, and one call a sequence.)

T = tokens of the step, C = tokens of the cache, L = layers of this pipeline stage, n = attention heads of
this tensor parallel rank, d = head_dim, Q = queries that stand alone, t = keys of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..step import BLOCK, Extent, Row

_SHORT = 8  # the tokens of a row of at most so many are queries that stand alone


@dataclass(frozen=True)
class _Long:
    """A row of many tokens, a piece of a prompt.

    Attributes:
        tokens: of the step.
        mask: bool [columns, t], True where a query may look; None for a piece that begins its sequence.
    """

    tokens: slice
    row: Row
    mask: Tensor | None


class KVCache:
    """The cache of one model on this rank.

    Args:
        num_layers: L; num_heads: n; tokens: C, a multiple of BLOCK.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens = tokens
        self._num_heads, self._head_dim = num_heads, head_dim
        self._width = num_heads * head_dim
        self._scale = head_dim**-0.5
        # An operating system gives pages of it as they are first written.
        self._memory = torch.empty((num_layers, 2, tokens * self._width), dtype=dtype, device=device)
        self._layers = list(self._memory.unbind())
        # embedding_bag is fast for float32 on a CPU alone.
        self._uses_bags = device.type == "cpu" and dtype == torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes at the most."""
        return self._memory.nbytes

    @staticmethod
    def bytes_per_token(num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that a token takes on this rank."""
        return 2 * num_layers * num_heads * head_dim * dtype.itemsize

    def begin(self, rows: tuple[Row, ...]) -> Tensor:
        """Prepare what all layers share in a step.

        Returns:
            positions [T]
        """
        self._long: list[_Long] = []
        alone: list[tuple[int, int, int]] = []  # token of the step, first block, position
        positions: list[int] = []
        for row in rows:
            first, count = len(positions), len(row.tokens)
            if count <= _SHORT and self._uses_bags:
                block = row.extent.start // BLOCK
                alone += [(first + i, block, row.position + i) for i in range(count)]
            else:
                self._long.append(_Long(slice(first, first + count), row, self._mask(row.position, count)))
            positions += range(row.position, row.position + count)
        self._bags = _Bags(alone, self._num_heads, self._head_dim) if alone else None
        self._all_alone = not self._long
        return torch.tensor(positions, device=self._memory.device)

    def _mask(self, position: int, columns: int) -> Tensor | None:
        if columns == 1 or position == 0:  # sees everything, or is plainly causal
            return None
        every = torch.ones(columns, position + columns, dtype=torch.bool, device=self._memory.device)
        return every.tril(position)

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """Store this step's keys and values, and attend.

        Args:
            layer: from 0 within the stage.
            query_key_value: [T, n, 3, d]

        Returns:
            softmax(q d**-0.5 k^T) v of every token over its own sequence so far, [T, n * d]
        """
        keys, values = self._layers[layer]
        if self._all_alone:
            return self._bags.attend(query_key_value, keys, values, self._scale)
        output = query_key_value.new_empty(query_key_value.size(0), self._width)
        for long in self._long:
            output[long.tokens] = self._attend_long(long, query_key_value[long.tokens], keys, values)
        if self._bags is not None:
            chosen = self._bags.tokens
            output[chosen] = self._bags.attend(query_key_value[chosen], keys, values, self._scale)
        return output

    def _attend_long(self, long: _Long, query_key_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Torch's attention kernel, which wants keys and values as [n, t, d]."""
        query, key, value = query_key_value.permute(2, 1, 0, 3)  # [n, columns, d]
        row = long.row
        end = row.position + len(row.tokens)
        self._store(row.extent, row.position, key, value, keys, values)
        if row.position > 0:
            key, value = self._gather(row.extent, end, keys, values)
        output = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=long.mask,
            is_causal=long.mask is None and len(row.tokens) > 1,
            scale=self._scale,
        )
        return output[0].transpose(0, 1).reshape(-1, self._width)

    def _store(self, extent: Extent, position: int, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> None:
        key_blocks, value_blocks = self._in_blocks(extent, keys, values)
        done, count = 0, key.size(1)
        while done < count:
            block, within = divmod(position + done, BLOCK)
            size = min(BLOCK - within, count - done)
            key_blocks[block, :, :, within : within + size] = key[:, done : done + size].transpose(1, 2)
            value_blocks[block, :, within : within + size] = value[:, done : done + size]
            done += size

    def _gather(self, extent: Extent, end: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values of an extent, [n, end, d]."""
        count = -(-end // BLOCK)
        key_blocks, value_blocks = (blocks[:count] for blocks in self._in_blocks(extent, keys, values))
        return (
            key_blocks.permute(1, 0, 3, 2).reshape(self._num_heads, count * BLOCK, self._head_dim)[:, :end],
            value_blocks.transpose(0, 1).reshape(self._num_heads, count * BLOCK, self._head_dim)[:, :end],
        )

    def _in_blocks(self, extent: Extent, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[..., blocks, n, d, 64] and [..., blocks, n, 64, d] of memory [..., C * n * d]"""
        begin, length = extent.start * self._width, extent.size * self._width
        n, d, count = self._num_heads, self._head_dim, extent.size // BLOCK
        return (
            keys.narrow(-1, begin, length).unflatten(-1, (count, n, d, BLOCK)),
            values.narrow(-1, begin, length).unflatten(-1, (count, n, BLOCK, d)),
        )

    def copy(self, source: Extent, target: Extent, begin: int, end: int) -> None:
        """Tokens [begin, end) of one extent over those of another, in all layers."""
        keys, values = self._memory.unbind(1)
        from_keys, from_values = self._in_blocks(source, keys, values)
        to_keys, to_values = self._in_blocks(target, keys, values)
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            inside = slice(max(begin - block * BLOCK, 0), min(end - block * BLOCK, BLOCK))
            to_keys[:, block, :, :, inside] = from_keys[:, block, :, :, inside]
            to_values[:, block, :, inside] = from_values[:, block, :, inside]


class _Bags:
    """Attention of queries that stand alone, as weighted sums of rows of the cache.

    A bag of keys is a block of one head and query: d rows of 64 scores. A bag of values is a head of a query:
    t rows of d. Indices are made once a step and serve all layers.

    Attributes:
        tokens: [Q] of the step.
    """

    def __init__(self, queries: list[tuple[int, int, int]], n: int, d: int) -> None:
        self.tokens, first_blocks, positions = torch.tensor(queries).unbind(1)  # [Q]
        self._n, self._d = n, d
        lengths = positions + 1
        heads = torch.arange(n)
        newest = first_blocks + positions // BLOCK
        cells = newest[:, None] * n + heads  # [Q, n]: block and head
        within = (positions % BLOCK)[:, None]
        self._value_places = (cells * BLOCK + within).view(-1)
        self._key_places = ((cells[..., None] * d + torch.arange(d)) * BLOCK + within[..., None]).view(-1)
        self._index_keys(first_blocks, lengths, heads)
        self._index_values(first_blocks, lengths, heads)

    def _index_keys(self, first_blocks: Tensor, lengths: Tensor, heads: Tensor) -> None:
        counts = -(-lengths // BLOCK)  # blocks of each query
        self._width = int(counts.max()) * BLOCK
        blocks = torch.arange(self._width // BLOCK)
        is_there = (blocks < counts[:, None])[:, None].expand(-1, self._n, -1)  # [Q, n, most blocks]
        cells = (first_blocks[:, None] + blocks)[:, None] * self._n + heads[:, None]  # [Q, n, most blocks]
        if not is_there.all():
            cells = cells[is_there]
            self._bag_places = is_there.reshape(-1).nonzero()[:, 0]  # bags, among [Q, n, most blocks]
            self._bag_queries = self._bag_places // len(blocks)  # bags, among [Q, n]
        else:
            self._bag_places = None
        self._key_rows = (cells.reshape(-1, 1) * self._d + torch.arange(self._d)).view(-1).int()
        self._key_offsets = torch.arange(0, self._key_rows.numel() + 1, self._d, dtype=torch.int32)

    def _index_values(self, first_blocks: Tensor, lengths: Tensor, heads: Tensor) -> None:
        # With one length for all, a slice of the scores does what else takes a mask and a selection.
        self._length = int(lengths[0]) if bool((lengths == lengths[0]).all()) else None
        positions = torch.arange(self._width if self._length is None else self._length)
        rows = (first_blocks[:, None] + positions // BLOCK) * (self._n * BLOCK) + positions % BLOCK  # [Q, most]
        rows = (rows[:, None] + heads[:, None] * BLOCK).reshape(-1)  # [Q * n * most]
        if self._length is None:
            is_there = (positions < lengths[:, None])[:, None]  # [Q, 1, most]
            self._beyond = ~is_there
            self._weights = is_there.expand(-1, self._n, -1).reshape(-1).nonzero()[:, 0]
            rows = rows[self._weights]
        self._value_rows = rows.int()
        offsets = torch.zeros(lengths.numel() * self._n + 1, dtype=torch.int32)
        offsets[1:] = lengths.repeat_interleave(self._n).cumsum(0)
        self._value_offsets = offsets

    def attend(self, query_key_value: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Store and attend: [Q, n, 3, d] -> [Q, n * d]."""
        n, d = self._n, self._d
        query, key, value = query_key_value.unbind(2)
        value_rows = values.view(-1, d)
        keys.index_copy_(0, self._key_places, key.reshape(-1))
        value_rows.index_copy_(0, self._value_places, value.reshape(-1, d))
        scores = self._scores((query * scale).view(-1, d), keys.view(-1, BLOCK)).view(-1, n, self._width)
        if self._length is not None:
            probabilities = scores[:, :, : self._length].softmax(-1).view(-1)
        else:  # masked, and not added to: what lies there may be no number
            probabilities = scores.masked_fill(self._beyond, -torch.inf).softmax(-1).view(-1)
            probabilities = probabilities.index_select(0, self._weights)
        return _sum_bags(value_rows, self._value_rows, self._value_offsets, probabilities).view(-1, n * d)

    def _scores(self, queries: Tensor, key_rows: Tensor) -> Tensor:
        """[Q * n, d] -> [Q * n, most blocks, 64]"""
        blocks = self._width // BLOCK
        if self._bag_places is None:
            weights = queries[:, None].expand(-1, blocks, -1).reshape(-1)
            return _sum_bags(key_rows, self._key_rows, self._key_offsets, weights)
        weights = queries.index_select(0, self._bag_queries).view(-1)
        sums = _sum_bags(key_rows, self._key_rows, self._key_offsets, weights)
        scores = queries.new_empty(queries.size(0) * blocks, BLOCK)
        return scores.index_copy_(0, self._bag_places, sums)


def _sum_bags(table: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted rows of `table`: bag i are `rows[offsets[i]:offsets[i + 1]]`."""
    return torch.embedding_bag(table, rows, offsets, False, 0, False, weights, True)[0]
