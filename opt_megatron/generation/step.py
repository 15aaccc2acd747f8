"""What the leader tells the other ranks before every step: one small broadcast of integers.

    [kind, how many numbers follow, number, number, ...]      filled up to a fixed size

A plan that is longer than the fixed size (a long piece of a prompt) sends the rest in a second broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

from ..parallel.context import ParallelContext

_HEADER = 2
_INLINE = 510  # numbers in the first broadcast: 4 KiB with the header


class Kind(IntEnum):
    """What to do."""

    ALLOCATE = 0  # tokens of the cache, for each model
    FORWARD = 1  # which model, and a Step
    COPY = 2  # which model, source extent (start, size), target extent (start, size), from token, to token
    WAIT = 3  # nothing; sent while there is nothing to do, so that no rank thinks the leader lost
    STOP = 4


class Output(IntEnum):
    """What a step is to give the leader for the tokens that it asks about."""

    BEST = 0  # the best id and its logit alone: greedy decoding
    LOGITS = 1  # logits of the whole vocabulary
    HIDDEN = 2  # logits, and behind them the hidden state after the last layer


BLOCK = 64  # tokens; extents begin at multiples of it, so that a block of the cache belongs to one sequence


class Extent(NamedTuple):
    """Where a row's keys and values are in the cache: `size` tokens from `start` on, both multiples of BLOCK."""

    start: int
    size: int


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step.

    Attributes:
        extent: its place in the cache.
        position: of the first of `tokens`; the cache holds what comes before.
        tokens: what is fed, at most up to the extent's end.
        asked: how many of the last of `tokens` the leader wants the output for.
    """

    extent: Extent
    position: int
    tokens: tuple[int, ...]
    asked: int


@dataclass(frozen=True)
class Step:
    """One forward pass over rows of any lengths."""

    rows: tuple[Row, ...]
    output: Output

    def to_numbers(self) -> list[int]:
        """A flat list that `from_numbers` understands."""
        numbers = [self.output, len(self.rows)]
        for row in self.rows:
            numbers += [*row.extent, row.position, row.asked, len(row.tokens)]
        for row in self.rows:
            numbers += row.tokens
        return numbers

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Step:
        """The inverse of `to_numbers`."""
        output, count = numbers[:2]
        rows, begin = [], 2 + 5 * count
        for head in range(2, begin, 5):
            start, size, position, asked, length = numbers[head : head + 5]
            rows.append(Row(Extent(start, size), position, tuple(numbers[begin : begin + length]), asked))
            begin += length
        return cls(tuple(rows), Output(output))


class PlanChannel:
    """Sends plans from the leader and receives them on the other ranks."""

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel
        self._buffer = torch.zeros(_HEADER + _INLINE, dtype=torch.int64)

    def send(self, kind: Kind, numbers: list[int]) -> None:
        """Tell the other ranks; alone, do nothing."""
        if self._parallel.world_size == 1:
            return
        inline = numbers[:_INLINE]
        self._buffer[: _HEADER + len(inline)] = torch.tensor([kind, len(numbers), *inline])
        self._parallel.broadcast_integers(self._buffer)
        if len(numbers) > _INLINE:
            self._parallel.broadcast_integers(torch.tensor(numbers[_INLINE:]))

    def receive(self) -> tuple[Kind, list[int]]:
        """Wait for the leader's next plan."""
        self._parallel.broadcast_integers(self._buffer)
        kind, count, *inline = self._buffer.tolist()
        rest = torch.zeros(max(0, count - _INLINE), dtype=torch.int64)
        if len(rest):
            self._parallel.broadcast_integers(rest)
        return Kind(kind), inline[:count] + rest.tolist()
