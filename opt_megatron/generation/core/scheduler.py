"""Who runs next: admission by what fits into the cache, shared prefixes, and prompts in pieces.

Knows branches and cache memory, no model: what it decides can be tested with numbers alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..decoding.sequences import Branch, CachedSequence, Copy, Feed
from ..step import Extent
from .kv_cache_allocator import CacheMemory, common_prefix

# A prefix that is shorter than this is computed again: copying it is not worth waiting for another request.
_SHORTEST_SHARED = 16


@dataclass
class Planned:
    """A branch's part of a step."""

    branch: Branch
    feeds: list[Feed]


class Scheduler:
    """First come, first served, as long as rows and memory last.

    Args:
        max_batch_size: sequences that run at the same time.
        prefill_chunk_size: tokens of prompts that a step computes, so that a long one does not stall others.
    """

    def __init__(self, memory: CacheMemory, max_batch_size: int, prefill_chunk_size: int) -> None:
        self.memory = memory
        self.waiting: deque[Branch] = deque()
        self.running: list[Branch] = []
        self._max_batch_size = max_batch_size
        self._chunk = prefill_chunk_size

    def admit(self, copy: Copy) -> None:
        """Let waiting branches in, in their order, until one does not fit.

        One whose prompt begins like another's that is just being computed waits for it, and lets others pass.
        """
        passed: list[Branch] = []
        while self.waiting:
            branch = self.waiting[0]
            if self._num_rows + len(branch.sequences) > self._max_batch_size:
                break
            if branch.may_share and self._is_being_computed(branch):
                passed.append(self.waiting.popleft())
                continue
            if not self._place(branch, copy):
                break
            self.running.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(passed))

    @property
    def _num_rows(self) -> int:
        return sum(len(branch.sequences) for branch in self.running)

    def _is_being_computed(self, branch: Branch) -> bool:
        prompt = branch.lead.tokens
        for other in self.running:
            if other.is_prefilling:
                shared = min(common_prefix(other.lead.tokens, prompt), len(prompt) - 1)
                if shared >= _SHORTEST_SHARED and shared > other.lead.cached:
                    return True
        return False

    def _place(self, branch: Branch, copy: Copy) -> bool:
        source, shared = self._longest_prefix(branch) if branch.may_share else (None, 0)
        if source is not None and self.memory.is_retired(source):
            self.memory.keep(source)
        # If the first attempt fails, it has made all retired extents give way, among which it placed the sequences.
        extents = self._extents(branch) or self._extents(branch)
        if not extents:
            return False
        for sequence, extent in zip(branch.sequences, extents, strict=True):
            sequence.extent = extent
        if source is not None and self._still_there(source):
            copy(CachedSequence([], source), branch.lead, 0, shared)
            branch.lead.cached = shared
        return True

    def _extents(self, branch: Branch) -> list[Extent]:
        """One for each of the branch's sequences, or none at all."""
        extents: list[Extent] = []
        for _ in branch.sequences:
            extent = self.memory.allocate(branch.size)
            if extent is None:
                for given in extents:
                    self.memory.free(given)
                return []
            extents.append(extent)
        return extents

    def _longest_prefix(self, branch: Branch) -> tuple[Extent | None, int]:
        """Where the most of the branch's prompt is cached already; its last token is always computed."""
        prompt = branch.lead.tokens[:-1]
        source, shared = self.memory.longest_prefix(prompt)
        for other in self.running:
            cached = min(other.lead.cached, common_prefix(other.lead.tokens, prompt))
            if cached > shared:
                source, shared = other.lead.extent, cached
        return (source, shared) if shared >= _SHORTEST_SHARED else (None, 0)

    def _still_there(self, extent: Extent) -> bool:
        # Making room may have taken the very extent that was to be copied.
        return self.memory.is_retired(extent) or any(branch.lead.extent == extent for branch in self.running)

    def plan(self) -> list[Planned]:
        """What to feed in the next step: all that decode, then pieces of prompts, the first come first."""
        budget = self._chunk
        decoding = [Planned(b, b.feeds(0)) for b in self.running if not b.is_prefilling]
        prefilling = []
        for branch in self.running:
            if branch.is_prefilling and budget > 0:
                feeds = branch.feeds(budget)
                budget -= sum(feed.count for feed in feeds)
                prefilling.append(Planned(branch, feeds))
        return decoding + prefilling

    def release_finished(self) -> None:
        """Give back the memory of branches that have ended."""
        for branch in self.running:
            if branch.is_finished:
                self._release(branch)
        self.running = [branch for branch in self.running if not branch.is_finished]

    def _release(self, branch: Branch) -> None:
        for sequence in branch.sequences:
            contents = sequence.tokens[: sequence.cached]
            if len(contents) >= _SHORTEST_SHARED and sequence is branch.lead:
                self.memory.retire(sequence.extent, contents)
            else:
                self.memory.free(sequence.extent)

    def remove(self, number: int) -> list[Branch]:
        """Take out a request's branches, wherever they stand, and return them; their memory is free."""
        waiting = [branch for branch in self.waiting if branch.number == number]
        self.waiting = deque(branch for branch in self.waiting if branch.number != number)
        running = [branch for branch in self.running if branch.number == number]
        self.running = [branch for branch in self.running if branch.number != number]
        for branch in running:
            for sequence in branch.sequences:
                self.memory.free(sequence.extent)
        return waiting + running
