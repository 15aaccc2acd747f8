"""Keys and values of many sequences in blocks, and attention over them on any device and in any dtype.

All tokens of a step are stored by one call and attend by a constant number of calls a layer, however many sequences
they belong to: launching a kernel for each sequence would take longer than the kernels.

Single queries gather the blocks of their sequences, as tables say, up to the longest of them, and attend in one call
with a mask. Pieces of prompts are filled up to the longest piece, and attend in one other call.

T = tokens of the step, Q = single queries, P = pieces of prompts, q = tokens of the longest piece, K = blocks of the
longest sequence, t = 64 K, n = attention heads of this tensor parallel rank, d = head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence
from .packed_upload import upload

_MAX_SINGLE_QUERIES = 8  # a sequence with at most this many tokens in a step is computed as single queries


class _Rows(NamedTuple):
    """Single queries.

    Attributes:
        tokens: [Q], their indices among the step's tokens; None for all of them.
        tables: [Q, K], the blocks of each one's sequence.
        mask: [Q, 1, 1, t], 0 for the keys that a query sees, and -inf.
    """

    tokens: Tensor | None
    tables: Tensor
    mask: Tensor


class _Pieces(NamedTuple):
    """Pieces of prompts.

    Attributes:
        tokens: [P, q], indices among the step's tokens, the last one repeated.
        valid: [tokens], which of the P * q are not repetitions; targets: [tokens], their indices among the step's.
        tables: [P, K]; None where all pieces begin their sequences, so that the step has all their keys.
        mask: [P, 1, q, t] with `tables`.
    """

    tokens: Tensor
    valid: Tensor
    targets: Tensor
    tables: Tensor | None
    mask: Tensor | None


class PagedKVCache:
    """The cache of one model on this rank, and the attention over it (`kv_cache.KVCache`).

    Args:
        num_layers: of this pipeline stage.
        num_tokens: a multiple of BLOCK_SIZE.

    Attributes:
        scratch_block: one more block, for rows that belong to no sequence.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_tokens = num_tokens
        self.scratch_block = num_tokens // BLOCK_SIZE
        self._width, self._scale = num_heads * head_dim, head_dim**-0.5
        shape = (num_layers, self.scratch_block + 1, BLOCK_SIZE, num_heads, 2, head_dim)
        # Zeros, because what is masked has the probability 0, and 0 times NaN is NaN.
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = list(self._memory.unbind())
        self._block_numbers = torch.arange(self.scratch_block + 1, device=device)
        self._key_positions = torch.arange(num_tokens + BLOCK_SIZE, device=device)
        self._seen = torch.zeros((), dtype=dtype, device=device)
        self._unseen = torch.full((), -torch.inf, dtype=dtype, device=device)
        self._rows: _Rows | None = None
        self._pieces: _Pieces | None = None

    def prepare_step(self, sequences: tuple[ScheduledSequence, ...]) -> Tensor:
        """See KVCache."""
        single: list[tuple[int, int, int]] = []  # index among the step's tokens, first block, position
        pieces: list[tuple[int, ScheduledSequence]] = []  # index of the first token
        positions: list[int] = []
        slots: list[int] = []
        for sequence in sequences:
            first, start, count = len(positions), sequence.blocks.start, len(sequence.tokens)
            here = range(sequence.position, sequence.position + count)
            if count <= _MAX_SINGLE_QUERIES:
                single += [(first + i, start // BLOCK_SIZE, position) for i, position in enumerate(here)]
            else:
                pieces.append((first, sequence))
            positions += here
            slots += range(start + here.start, start + here.stop)
        device = self._memory.device
        indices, first_blocks, seen = zip(*single, strict=True) if single else ((), (), ())
        stored, self._slots, *packed = upload(device, positions, slots, indices, first_blocks, seen)
        self._rows = self._pieces = None
        if single:
            tables = self._tables(packed[1], max(seen) // BLOCK_SIZE + 1)
            self._rows = self._rows_of(tables, packed[2], packed[0] if pieces else None)
        if pieces:
            self._pieces = self._pieces_of(pieces)
        return stored

    def prepare_decode(self, first_blocks: Tensor, positions: Tensor, num_blocks: int) -> None:
        """Prepare a step with one token of each sequence, from what is on the device already.

        Nothing is sent there, and nothing waits for it.

        Args:
            first_blocks: [Q] int64, of each sequence.
            positions: [Q] int64, of the tokens.
            num_blocks: K, at least as many as the last position needs.
        """
        self._slots = torch.add(positions, first_blocks, alpha=BLOCK_SIZE)
        self._rows, self._pieces = self._rows_of(self._tables(first_blocks, num_blocks), positions, None), None

    def _tables(self, first_blocks: Tensor, num_blocks: int) -> Tensor:
        """[sequences, K]; other sequences' blocks may follow their own."""
        return (first_blocks[:, None] + self._block_numbers[:num_blocks]).clamp_(max=self.scratch_block)

    def _rows_of(self, tables: Tensor, positions: Tensor, tokens: Tensor | None) -> _Rows:
        keys = self._key_positions[: tables.size(1) * BLOCK_SIZE]
        mask = torch.where(keys <= positions[:, None], self._seen, self._unseen)
        return _Rows(tokens, tables, mask[:, None, None])

    def _pieces_of(self, pieces: list[tuple[int, ScheduledSequence]]) -> _Pieces:
        longest = max(len(sequence.tokens) for _, sequence in pieces)
        counts = [len(sequence.tokens) for _, sequence in pieces]
        firsts, sizes, begins, first_blocks, valid, targets = upload(
            self._memory.device,
            [first for first, _ in pieces],
            counts,
            [sequence.position for _, sequence in pieces],
            [sequence.blocks.start // BLOCK_SIZE for _, sequence in pieces],
            [row * longest + i for row, count in enumerate(counts) for i in range(count)],
            [first + i for (first, _), count in zip(pieces, counts, strict=True) for i in range(count)],
        )
        inside = torch.minimum(self._key_positions[:longest], sizes[:, None] - 1)  # [P, q]
        if all(sequence.position == 0 for _, sequence in pieces):
            return _Pieces(firsts[:, None] + inside, valid, targets, None, None)
        length = max(sequence.position + len(sequence.tokens) for _, sequence in pieces)
        tables = self._tables(first_blocks, -(-length // BLOCK_SIZE))
        positions = begins[:, None] + inside
        keys = self._key_positions[: tables.size(1) * BLOCK_SIZE]
        mask = torch.where(keys <= positions[:, :, None], self._seen, self._unseen)
        return _Pieces(firsts[:, None] + inside, valid, targets, tables, mask[:, None])

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """See KVCache."""
        blocks, rows, pieces = self._layers[layer], self._rows, self._pieces
        blocks.flatten(0, 1).index_copy_(0, self._slots, query_key_value[:, :, 1:])
        if pieces is None:
            assert rows is not None
            return self._attend_rows(rows, query_key_value, blocks)
        output = query_key_value.new_empty(query_key_value.size(0), self._width)
        output.index_copy_(0, pieces.targets, self._attend_pieces(pieces, query_key_value, blocks))
        if rows is not None:
            assert rows.tokens is not None
            output.index_copy_(0, rows.tokens, self._attend_rows(rows, query_key_value, blocks))
        return output

    def _attend_rows(self, rows: _Rows, query_key_value: Tensor, blocks: Tensor) -> Tensor:
        """[Q, n * d]"""
        query = query_key_value[:, :, 0] if rows.tokens is None else query_key_value[:, :, 0][rows.tokens]
        key, value = self._gather(blocks, rows.tables)
        output = scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=rows.mask, scale=self._scale)
        return output.reshape(-1, self._width)

    def _attend_pieces(self, pieces: _Pieces, query_key_value: Tensor, blocks: Tensor) -> Tensor:
        """[tokens of pieces, n * d]"""
        query, key, value = query_key_value[pieces.tokens].permute(3, 0, 2, 1, 4)  # [P, n, q, d]
        if pieces.tables is not None:
            key, value = self._gather(blocks, pieces.tables)
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=pieces.mask, is_causal=pieces.mask is None, scale=self._scale
        )
        return output.transpose(1, 2).reshape(-1, self._width)[pieces.valid]

    @staticmethod
    def _gather(blocks: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [sequences, n, t, d] of the blocks [sequences, K]."""
        gathered = blocks.index_select(0, tables.view(-1)).unflatten(0, tables.shape).flatten(1, 2)
        key, value = gathered.permute(3, 0, 2, 1, 4)
        return key, value

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """See KVCache."""
        tokens = self._memory.flatten(1, 2)
        tokens[:, target.start + begin : target.start + end] = tokens[:, source.start + begin : source.start + end]
