"""What the leader tells the other ranks before every step: one small broadcast of integers.

    [kind, how many numbers follow, number, number, ...]      filled up to a fixed size

A plan that is longer than the fixed size (a prefill's tokens) sends the rest in a second broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from ..parallel import ParallelContext

_HEADER = 2
_INLINE = 254  # numbers in the first broadcast: 2 KiB with the header


class Kind(IntEnum):
    """What to do."""

    ALLOCATE = 0  # slots, length
    FORWARD = 1  # a Step
    MOVE = 2  # source slot, target slot
    STOP = 3


@dataclass(frozen=True)
class Step:
    """One forward pass over rows that stand in neighbouring slots of the cache.

    Attributes:
        starts: [b] position of each row's first token in this step.
        counts: [b] how many of the row's tokens are real; the rest, on the right, is padding.
        tokens: [b][s]
    """

    first_slot: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]

    def to_numbers(self) -> list[int]:
        """A flat list that `from_numbers` understands."""
        flat = [token for row in self.tokens for token in row]
        return [self.first_slot, len(self.starts), len(self.tokens[0]), *self.starts, *self.counts, *flat]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Step:
        """The inverse of `to_numbers`."""
        first_slot, rows, columns = numbers[:3]
        starts, counts, flat = numbers[3 : 3 + rows], numbers[3 + rows : 3 + 2 * rows], numbers[3 + 2 * rows :]
        tokens = tuple(tuple(flat[row * columns : (row + 1) * columns]) for row in range(rows))
        return cls(first_slot, tuple(starts), tuple(counts), tokens)


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
