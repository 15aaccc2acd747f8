"""The scheduler: admission by free KV-cache blocks, shared prefixes, and prompts in pieces (chunked prefill).

It uses sequence groups and the allocator, but no model, so that its decisions can be tested with numbers alone.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ..decoding.sequences import CachedSequence, CopyCache, SequenceGroup, common_prefix_length
from ..step import KVCacheBlocks, ScheduledSequence
from .kv_cache_allocator import KVCacheAllocator

# A shorter prefix is computed again: copying it is not worth waiting for another request.
_MIN_SHARED_PREFIX = 16


class ScheduledGroup(NamedTuple):
    """A group's part of a step."""

    group: SequenceGroup
    sequences: list[ScheduledSequence]


class Scheduler:
    """First come, first served, within the limits of batch size and memory.

    Args:
        max_batch_size: sequences that run at the same time.
        prefill_chunk_size: tokens of prompts that a step computes, so that a long one does not delay others.

    Attributes:
        waiting: groups without blocks, in the order of their arrival.
        running: groups with blocks.
    """

    def __init__(self, allocator: KVCacheAllocator, max_batch_size: int, prefill_chunk_size: int) -> None:
        self.allocator = allocator
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self._max_batch_size = max_batch_size
        self._chunk_size = prefill_chunk_size

    def admit(self, copy: CopyCache) -> None:
        """Start waiting groups in their order, until one does not fit.

        A group whose prompt has a common prefix with one that is just being computed waits for it, and those behind it
        may start before.
        """
        postponed: list[SequenceGroup] = []
        while self.waiting:
            group = self.waiting[0]
            if self._num_sequences + len(group.sequences) > self._max_batch_size:
                break
            if group.can_share_prefix and self._is_prefix_being_computed(group):
                postponed.append(self.waiting.popleft())
                continue
            if not self._start(group, copy):
                break
            self.running.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(postponed))

    @property
    def _num_sequences(self) -> int:
        return sum(len(group.sequences) for group in self.running)

    def _is_prefix_being_computed(self, group: SequenceGroup) -> bool:
        prompt = group.lead.tokens
        for other in self.running:
            if other.lead.is_prefilling:
                shared = min(common_prefix_length(other.lead.tokens, prompt), len(prompt) - 1)
                if shared >= _MIN_SHARED_PREFIX and shared > other.lead.num_cached:
                    return True
        return False

    def _start(self, group: SequenceGroup, copy: CopyCache) -> bool:
        """Allocate the group's blocks and copy a shared prefix; False if there is no memory for it now."""
        source, shared = self._longest_prefix(group) if group.can_share_prefix else (None, 0)
        if source is not None and self.allocator.is_evictable(source):
            self.allocator.touch(source)
        # A first attempt that fails has evicted everything, between which it may have placed its blocks: try again.
        allocated = self._allocate(group) or self._allocate(group)
        if not allocated:
            return False
        for sequence, blocks in zip(group.sequences, allocated, strict=True):
            sequence.blocks = blocks
        if source is not None and self._is_readable(source):
            copy(CachedSequence([], source), group.lead, 0, shared)
            group.lead.num_cached = shared
        return True

    def _allocate(self, group: SequenceGroup) -> list[KVCacheBlocks]:
        """Blocks for each of the group's sequences, or an empty list."""
        allocated: list[KVCacheBlocks] = []
        for _ in group.sequences:
            blocks = self.allocator.allocate(group.max_length)
            if blocks is None:
                for others in allocated:
                    self.allocator.free(others)
                return []
            allocated.append(blocks)
        return allocated

    def _longest_prefix(self, group: SequenceGroup) -> tuple[KVCacheBlocks | None, int]:
        """Where most of the group's prompt is cached already, and how many tokens; its last one is always computed."""
        prompt = group.lead.tokens[:-1]
        source, shared = self.allocator.longest_prefix(prompt)
        for other in self.running:
            cached = min(other.lead.num_cached, common_prefix_length(other.lead.tokens, prompt))
            if cached > shared:
                source, shared = other.lead.blocks, cached
        return (source, shared) if shared >= _MIN_SHARED_PREFIX else (None, 0)

    def _is_readable(self, blocks: KVCacheBlocks) -> bool:
        # The allocation may have evicted the very blocks that were to be copied.
        return self.allocator.is_evictable(blocks) or any(group.lead.blocks == blocks for group in self.running)

    def schedule(self) -> list[ScheduledGroup]:
        """The next step: all groups that decode, then pieces of prompts, in the order of arrival."""
        budget = self._chunk_size
        decoding, prefilling = [], []
        for group in self.running:
            if not group.lead.is_prefilling:
                decoding.append(ScheduledGroup(group, group.schedule(0)))
            elif budget > 0:
                sequences = group.schedule(budget)
                budget -= sum(len(sequence.tokens) for sequence in sequences)
                prefilling.append(ScheduledGroup(group, sequences))
        return decoding + prefilling

    def release_finished(self) -> None:
        """Free the blocks of groups that have ended."""
        finished = [group for group in self.running if group.is_finished]
        if finished:
            for group in finished:
                self._free(group)
            self.running = [group for group in self.running if not group.is_finished]

    def _free(self, group: SequenceGroup) -> None:
        for sequence in group.sequences:
            contents = sequence.tokens[: sequence.num_cached] if sequence is group.lead else []
            is_reusable = len(contents) >= _MIN_SHARED_PREFIX
            self.allocator.free(sequence.blocks, contents if is_reusable else ())

    def remove(self, request_id: int) -> list[SequenceGroup]:
        """Remove a request's groups, waiting or running, and return them; their blocks are free."""
        waiting = [group for group in self.waiting if group.request_id == request_id]
        self.waiting = deque(group for group in self.waiting if group.request_id != request_id)
        running = [group for group in self.running if group.request_id == request_id]
        self.running = [group for group in self.running if group.request_id != request_id]
        for group in running:
            for sequence in group.sequences:
                self.allocator.free(sequence.blocks)
        return waiting + running
