"""The executor: runs the leader's calls of the models on all ranks."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from ...parallel.command_loop import CommandLoop
from ...parallel.context import ParallelContext
from ..decoding.sequences import CachedSequence
from ..step import KVCacheBlocks, StepInput, StepOutput


class Runner(Protocol):
    """One model on this rank, with its cache (`ModelRunner`); tests use other implementations."""

    @property
    def keeps_tokens(self) -> bool:
        """Chosen tokens stay on the devices, so that a step may be started before those of the last are read."""

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the cache for one token."""

    def allocate(self, num_tokens: int) -> None:
        """Allocate a cache of at least `num_tokens` tokens."""

    def forward(self, step: StepInput) -> StepOutput:
        """Run one step; the output is the leader's, and has no meaning on other ranks."""

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of one sequence's blocks to another's."""


class Command(IntEnum):
    """The commands that are broadcast for the leader's calls; the comments list the numbers that follow."""

    ALLOCATE = 0  # tokens of the cache, for each runner
    FORWARD = 1  # which runner, and a StepInput
    ADVANCE = 2  # which runner: the step after its last one, for the same sequences
    COPY = 3  # which runner, source and target blocks (start, size), begin, end


class Executor:
    """Executes the leader's calls on the runners of all ranks.

    Args:
        runners: of the model, and of the draft model if there is one.

    Attributes:
        commands: the loop in which the other ranks follow.
    """

    def __init__(self, parallel: ParallelContext, runners: list[Runner]) -> None:
        self.commands = CommandLoop(parallel, self.execute)
        self._runners = runners
        self._last: dict[int, StepInput] = {}  # of each runner

    def allocate(self, num_tokens: int) -> None:
        """Allocate caches of at least `num_tokens` tokens."""
        self.commands.send(Command.ALLOCATE, [num_tokens] * len(self._runners))
        for runner in self._runners:
            runner.allocate(num_tokens)

    def forward(self, step: StepInput, runner: int = 0) -> StepOutput:
        """Run a step of one of the models. It is described to the followers only if the sequences have changed."""
        if self.commands.has_followers:
            if step.continues(self._last.get(runner)):
                self.commands.send(Command.ADVANCE, [runner])
            else:
                self.commands.send(Command.FORWARD, [runner, *step.to_numbers()])
            self._last[runner] = step
        return self._runners[runner].forward(step)

    def copy(self, source: CachedSequence, target: CachedSequence, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of a sequence's keys and values in the model's cache to another's."""
        if begin < end:
            self.commands.send(Command.COPY, [0, *source.blocks, *target.blocks, begin, end])
            self._runners[0].copy(source.blocks, target.blocks, begin, end)

    def execute(self, command: int, numbers: list[int]) -> None:
        """On a follower: do what one of the calls above does on the leader."""
        if command == Command.ALLOCATE:
            for runner, num_tokens in zip(self._runners, numbers, strict=True):
                runner.allocate(num_tokens)
        elif command == Command.FORWARD:
            self._follow(numbers[0], StepInput.from_numbers(numbers[1:]))
        elif command == Command.ADVANCE:
            self._follow(numbers[0], self._last[numbers[0]].advanced())
        else:
            runner_index, *blocks, begin, end = numbers
            self._runners[runner_index].copy(KVCacheBlocks(*blocks[:2]), KVCacheBlocks(*blocks[2:]), begin, end)

    def _follow(self, runner: int, step: StepInput) -> None:
        self._last[runner] = step
        self._runners[runner].forward(step)
