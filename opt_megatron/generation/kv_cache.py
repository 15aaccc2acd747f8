"""Keys and values of many sequences in one memory, and attention over them.

A sequence owns an extent: neighbouring tokens of the cache, as many as it can ever need, so that its keys are
read without gathering and without padding, whatever the lengths of its neighbours. Nothing outside a
sequence's own tokens is ever read: memory need not be cleared, and a sequence is shortened by writing over
its end. Within an extent heads come first, keys as [n, d, size] and values as [n, size, d]: both products of
a decoding step then run along memory, which on a CPU costs a quarter less than with keys as [n, size, d].

T = tokens of the step, C = tokens of the cache, L = layers of this pipeline stage, n = attention heads of
this tensor parallel rank, d = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .plan import Extent, Row

_SHORT = 16  # a row of at most so many tokens is stored by index and attends by two batched products


@dataclass(frozen=True)
class _Group:
    """Rows that attend in one call: one long row, or short ones alike in extents that stand side by side.

    Attributes:
        first, rows, columns: tokens [first, first + rows * columns) of the step, as rows x columns.
        position: of the first column; length: keys that the last column sees.
        extent: of the first row.
        mask: [columns, length]; bool, True where a query may look, for a long row that does not begin its
            sequence; what is added to the scores, for short rows of several tokens; else None.
    """

    first: int
    rows: int
    columns: int
    position: int
    extent: Extent
    mask: Tensor | None

    @property
    def length(self) -> int:
        return self.position + self.columns

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.rows * self.columns)

    @property
    def is_short(self) -> bool:
        return self.columns <= _SHORT


class KVCache:
    """The cache of one model on this rank.

    Args:
        num_layers: L; num_heads: n; tokens: C.
    """

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, tokens: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens = tokens
        self._num_heads, self._head_dim = num_heads, head_dim
        self._width = num_heads * head_dim
        self._scale = head_dim**-0.5
        # [L, keys or values, C * n * d]; an operating system gives pages of it as they are first written.
        self._memory = torch.empty((num_layers, 2, tokens * self._width), dtype=dtype, device=device)
        self._layers = [(keys, values, values.view(-1, head_dim)) for keys, values in self._memory.unbind()]

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
        self._groups = self._grouped(rows)
        spans = [range(row.position, row.position + len(row.tokens)) for row in rows]
        self._place_short(rows)
        return torch.tensor([position for span in spans for position in span], device=self._memory.device)

    def _place_short(self, rows: tuple[Row, ...]) -> None:
        """Where the keys and values of short rows go, and which tokens of the step they are."""
        places, tokens, first = [], [], 0
        for row in rows:
            count = len(row.tokens)
            if count <= _SHORT:
                places += [(*row.extent, row.position + i) for i in range(count)]
                tokens += range(first, first + count)
            first += count
        device = self._memory.device
        self._short: Tensor | slice | None = None
        if places:
            self._short = slice(None) if len(tokens) == first else torch.tensor(tokens, device=device)
            start, size, position = torch.tensor(places, device=device)[:, :, None].unbind(1)  # [t, 1]
            heads = torch.arange(self._num_heads, device=device)
            self._value_places = (start * self._num_heads + heads * size + position).view(-1)  # rows of d
            columns = torch.arange(self._width, device=device)
            self._key_places = (start * self._width + columns * size + position).view(-1)  # single numbers

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """Store this step's keys and values, and attend.

        Args:
            layer: from 0 within the stage.
            query_key_value: [T, n, 3, d]

        Returns:
            softmax(q d**-0.5 k^T) v of every token over its own sequence so far, [T, n * d]
        """
        keys, values, value_rows = self._layers[layer]
        if self._short is not None:
            _, key, value = query_key_value[self._short].unbind(2)  # [t, n, d]
            keys.index_copy_(0, self._key_places, key.reshape(-1))
            value_rows.index_copy_(0, self._value_places, value.reshape(-1, self._head_dim))
        outputs = []
        for group in self._groups:
            own = query_key_value[group.tokens]
            outputs.append(
                self._attend_short(group, own, keys, values)
                if group.is_short
                else self._attend_long(group, own, keys, values)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_short(self, group: _Group, query_key_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All rows' heads as one batch of products."""
        n, d, size, batch = self._num_heads, self._head_dim, group.extent.size, group.rows * self._num_heads
        queries = query_key_value[:, :, 0] * self._scale  # [rows * columns, n, d]
        if group.columns > 1:
            queries = queries.view(group.rows, group.columns, n, d).transpose(1, 2)
        offset = group.extent.start * self._width
        seen_keys = keys.as_strided((batch, d, group.length), (size * d, size, 1), keys.storage_offset() + offset)
        seen = values.as_strided((batch, group.length, d), (size * d, d, 1), values.storage_offset() + offset)
        scores = torch.bmm(queries.reshape(batch, group.columns, d), seen_keys)
        if group.mask is not None:
            scores += group.mask
        output = torch.bmm(scores.softmax(-1), seen)  # [rows * n, columns, d]
        if group.columns > 1:
            output = output.view(group.rows, n, group.columns, d).transpose(1, 2)
        return output.reshape(-1, self._width)

    def _attend_long(self, group: _Group, query_key_value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A piece of a prompt: torch's attention kernel, which wants keys as [n, length, d]."""
        query, key, value = query_key_value.permute(2, 1, 0, 3)  # [n, columns, d]
        begin, end = group.position, group.length
        all_keys, all_values = self._in_extent(group.extent, keys, values)
        all_keys[:, :, begin:end] = key.transpose(1, 2)
        all_values[:, begin:end] = value
        seen_keys = key if begin == 0 else all_keys[:, :, :end].transpose(1, 2).contiguous()
        output = scaled_dot_product_attention(
            query[None],
            seen_keys[None],
            all_values[None, :, :end],
            attn_mask=group.mask,
            is_causal=group.mask is None,
            scale=self._scale,
        )
        return output[0].transpose(0, 1).reshape(-1, self._width)

    def _in_extent(self, extent: Extent, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[..., n, d, size] and [..., n, size, d] of memory [..., C * n * d]"""
        begin, length = extent.start * self._width, extent.size * self._width
        n, d = self._num_heads, self._head_dim
        return (
            keys.narrow(-1, begin, length).unflatten(-1, (n, d, extent.size)),
            values.narrow(-1, begin, length).unflatten(-1, (n, extent.size, d)),
        )

    def _grouped(self, rows: tuple[Row, ...]) -> list[_Group]:
        groups, first, index = [], 0, 0
        while index < len(rows):
            head, count = rows[index], _alike(rows, index)
            columns = len(head.tokens)
            mask = self._mask(head.position, columns)
            groups.append(_Group(first, count, columns, head.position, head.extent, mask))
            first += count * columns
            index += count
        return groups

    def _mask(self, position: int, columns: int) -> Tensor | None:
        is_long = columns > _SHORT
        if columns == 1 or (is_long and position == 0):  # sees everything, or is plainly causal
            return None
        every = torch.ones(columns, position + columns, dtype=torch.bool, device=self._memory.device)
        visible = every.tril(position)
        if is_long:
            return visible
        return torch.zeros(visible.shape, dtype=self._memory.dtype, device=visible.device).masked_fill(
            ~visible, -torch.inf
        )

    def copy(self, source: Extent, target: Extent, begin: int, end: int) -> None:
        """Tokens [begin, end) of one extent over those of another, in all layers."""
        keys, values = self._memory.unbind(1)
        from_keys, from_values = self._in_extent(source, keys, values)
        to_keys, to_values = self._in_extent(target, keys, values)
        to_keys[..., begin:end] = from_keys[..., begin:end]
        to_values[..., begin:end, :] = from_values[..., begin:end, :]


def _alike(rows: tuple[Row, ...], index: int) -> int:
    """How many rows from `index` on are short, of one position and one number of tokens, and side by side."""
    head, count = rows[index], 1
    if len(head.tokens) > _SHORT:
        return 1
    while index + count < len(rows):
        row, expected = rows[index + count], head.extent.start + count * head.extent.size
        place = (row.position, len(row.tokens), *row.extent)
        if place != (head.position, len(head.tokens), expected, head.extent.size):
            break
        count += 1
    return count
