"""The input of one step of the engine: which sequences run, with which tokens, and what is computed for them.

The leader makes it and every rank runs it; `StepInput.to_numbers` is the form in which it is broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

BLOCK_SIZE = 64  # tokens; every block of the KV cache belongs to one sequence


class OutputKind(IntEnum):
    """What a step returns to the leader for each token with an output; each kind includes the previous one."""

    ARGMAX = 0  # only the best id and its logit: greedy decoding
    LOGITS = 1  # logits of the whole vocabulary
    HIDDEN_STATES = 2  # logits, followed by the hidden state after the last layer


class KVCacheBlocks(NamedTuple):
    """Consecutive blocks of the KV cache: the `size` tokens from `start` on, both multiples of BLOCK_SIZE."""

    start: int
    size: int


NO_BLOCKS = KVCacheBlocks(0, 0)  # of a sequence that still waits


class ScheduledSequence(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        blocks: where its keys and values are cached.
        position: of the first of `tokens`; what is before it is cached already.
        tokens: the model's input, which must fit into the blocks.
        num_logits: for how many of the last of `tokens` the leader gets an output.
    """

    blocks: KVCacheBlocks
    position: int
    tokens: tuple[int, ...]
    num_logits: int


@dataclass(frozen=True)
class StepInput:
    """One forward pass over sequences with any number of tokens each."""

    sequences: tuple[ScheduledSequence, ...]
    output_kind: OutputKind

    def to_numbers(self) -> list[int]:
        """A flat list of integers that `from_numbers` reads."""
        numbers: list[int] = [self.output_kind, len(self.sequences)]
        for blocks, position, tokens, num_logits in self.sequences:
            numbers += [*blocks, position, num_logits, len(tokens)]
        for sequence in self.sequences:
            numbers += sequence.tokens
        return numbers

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> StepInput:
        """The inverse of `to_numbers`."""
        output_kind, count = numbers[:2]
        sequences, begin = [], 2 + 5 * count
        for header in range(2, begin, 5):
            start, size, position, num_logits, length = numbers[header : header + 5]
            tokens = tuple(numbers[begin : begin + length])
            sequences.append(ScheduledSequence(KVCacheBlocks(start, size), position, tokens, num_logits))
            begin += length
        return cls(tuple(sequences), OutputKind(output_kind))
