"""The input of one step of the engine: which sequences run, with which tokens, and what is computed for them.

The leader makes it and every rank runs it; `StepInput.to_numbers` is the form in which it is broadcast.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from .sampling.batch_sampler import SamplingRow

BLOCK_SIZE = 64  # tokens; every block of the KV cache belongs to one sequence
# In place of a token of a step: the sequence's newest one, which was chosen on the devices and is kept there, and which
# the leader may not have read yet.
NEWEST = -1


class OutputKind(IntEnum):
    """What the leader gets where it chooses the next token itself; HIDDEN_STATES include LOGITS."""

    LOGITS = 0  # of the whole vocabulary
    HIDDEN_STATES = 1  # logits, followed by the hidden state after the last layer


class StepOutput(NamedTuple):
    """What a step gives the leader, on its device.

    Attributes:
        tokens: [chosen] int64, the next tokens of sequences with `sampling`; -1 where no token is possible.
        rows: [others, V] float32, or with the hidden states [others, V + H] (see OutputKind).
    """

    tokens: Tensor
    rows: Tensor


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
        num_logits: for how many of the last of `tokens` there is an output.
        sampling: how the tokens that follow are chosen in the step itself; None: the leader gets rows and chooses.
    """

    blocks: KVCacheBlocks
    position: int
    tokens: tuple[int, ...]
    num_logits: int
    sampling: SamplingRow | None = None

    @property
    def is_decoded(self) -> bool:
        """One token is computed, and the next one chosen in the step."""
        return len(self.tokens) == self.num_logits == 1 and self.sampling is not None

    def advanced(self) -> ScheduledSequence:
        """The same sequence one token later, where `is_decoded`."""
        return self._replace(position=self.position + 1, tokens=(NEWEST,))


@dataclass(frozen=True)
class StepInput:
    """One forward pass over sequences with any number of tokens each.

    Attributes:
        output_kind: of the outputs of sequences without `sampling`.
    """

    sequences: tuple[ScheduledSequence, ...]
    output_kind: OutputKind = OutputKind.LOGITS

    @property
    def is_decoding(self) -> bool:
        """Every sequence computes one token, and its next one is chosen in the step."""
        return all(sequence.is_decoded for sequence in self.sequences)

    def advanced(self) -> StepInput:
        """The step after one that `is_decoding`, for the same sequences."""
        return StepInput(tuple([sequence.advanced() for sequence in self.sequences]), self.output_kind)

    def continues(self, previous: StepInput | None) -> bool:
        """Whether it is `previous.advanced()`."""
        return previous is not None and previous.is_decoding and previous.advanced() == self

    def to_numbers(self) -> list[int]:
        """A flat list of integers that `from_numbers` reads."""
        numbers: list[int] = [self.output_kind, len(self.sequences)]
        for blocks, position, tokens, num_logits, sampling in self.sequences:
            numbers += [*blocks, position, num_logits, len(tokens), sampling is not None]
        for sequence in self.sequences:
            numbers += sequence.tokens
            if sequence.sampling is not None:
                numbers += sampling_numbers(sequence.sampling)
        return numbers

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> StepInput:
        """The inverse of `to_numbers`."""
        output_kind, count = numbers[:2]
        sequences, begin = [], 2 + 6 * count
        for header in range(2, begin, 6):
            start, size, position, num_logits, length, is_sampled = numbers[header : header + 6]
            tokens = tuple(numbers[begin : begin + length])
            begin += length
            sampling = None
            if is_sampled:
                sampling = _sampling_of(numbers[begin : begin + _SAMPLING_SIZE])
                begin += _SAMPLING_SIZE
            blocks = KVCacheBlocks(start, size)
            sequences.append(ScheduledSequence(blocks, position, tokens, num_logits, sampling))
        return cls(tuple(sequences), OutputKind(output_kind))


_SAMPLING = struct.Struct("=dqddqqddqq")  # the fields of a SamplingRow
_SAMPLING_SIZE = len(SamplingRow._fields)
_INTEGERS = struct.Struct(f"={_SAMPLING_SIZE}q")


def sampling_numbers(row: SamplingRow) -> list[int]:
    """The fields as 64-bit integers, those that are float64 by their bits."""
    return list(_INTEGERS.unpack(_SAMPLING.pack(*row)))


def _sampling_of(numbers: list[int]) -> SamplingRow:
    return SamplingRow(*_SAMPLING.unpack(_INTEGERS.pack(*numbers)))
