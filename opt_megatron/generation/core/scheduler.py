"""The scheduler: free KV-cache blocks, shares of clients, common prefixes, and prompts in pieces (chunked prefill).

It uses sequence groups and the allocator, but no model, so that its decisions can be tested with numbers alone.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ..decoding.sequences import CachedSequence, CopyCache, SequenceGroup, common_prefix_length
from ..step import KVCacheBlocks, ScheduledSequence
from .kv_cache_allocator import KVCacheAllocator
from .waiting_groups import WaitingGroups

# A shorter prefix is computed again: copying it is not worth waiting for another request.
_MIN_SHARED_PREFIX = 16


class ScheduledGroup(NamedTuple):
    """A group's part of a step.

    Attributes:
        is_restored: the sequences' caches are computed again, without outputs.
    """

    group: SequenceGroup
    sequences: list[ScheduledSequence]
    is_restored: bool = False


class SchedulerCounters(NamedTuple):
    """What a scheduler has done so far.

    Attributes:
        tokens: that were scheduled to be computed.
        prefix_queries: tokens of prompts whose beginning was looked for in the cache.
        prefix_hits: those of them that were found there, and copied.
        preemptions: groups that had to give their place to another client's.
        drafts: steps of sequences with proposed tokens (speculative decoding).
        draft_tokens: that were proposed.
        accepted_tokens: those of them that were accepted.
    """

    tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def plus(self, **more: int) -> SchedulerCounters:
        """The counters with more of some of them."""
        return self._replace(**{name: getattr(self, name) + count for name, count in more.items()})


class Scheduler:
    """Divides the batch among clients; the groups of one client are served in their order.

    The client with the fewest running sequences comes next, and where batch or memory are full, a group of the client
    with the most is preempted for it. So one client's many requests do not keep another's waiting.

    Args:
        max_batch_size: sequences that run at the same time.
        prefill_chunk_size: tokens of prompts that a step computes, so that a long one does not delay others.

    Attributes:
        waiting: groups without blocks.
        running: groups with blocks.
        counters: of what it has done.
    """

    def __init__(self, allocator: KVCacheAllocator, max_batch_size: int, prefill_chunk_size: int) -> None:
        self.allocator = allocator
        self.waiting = WaitingGroups()
        self.running: list[SequenceGroup] = []
        self.counters = SchedulerCounters()
        self._max_batch_size = max_batch_size
        self._chunk_size = prefill_chunk_size

    def admit(self, copy: CopyCache) -> None:
        """Start waiting groups, until the next one does not fit.

        A group whose prompt has a common prefix with one that is just being computed waits for it, and those behind it
        may start before.
        """
        postponed: list[SequenceGroup] = []
        while self.waiting:
            group = self.waiting.next(self._sequences_of_clients())
            if not self._has_rows(group) and self._find_victim(group) is None:
                break
            self.waiting.take(group)
            if group.can_share_prefix and self._is_prefix_being_computed(group):
                postponed.append(group)
            elif self._start_or_preempt(group, copy):
                self.running.append(group)
            else:
                self.waiting.put_back(group)
                break
        for group in reversed(postponed):
            self.waiting.put_back(group)

    def _sequences_of_clients(self) -> Counter[int]:
        """The number of running sequences of each client."""
        return Counter(group.request.client for group in self.running for _ in group.sequences)

    def _has_rows(self, group: SequenceGroup) -> bool:
        return sum(len(other.sequences) for other in [*self.running, group]) <= self._max_batch_size

    def _start_or_preempt(self, group: SequenceGroup, copy: CopyCache) -> bool:
        """Start a group, and preempt others for the rows and the memory that it lacks; False if it does not fit."""
        while not (self._has_rows(group) and self._start(group, copy)):
            victim = self._find_victim(group)
            if victim is None:
                return False
            self.running.remove(victim)
            self._free(victim)
            victim.preempt()
            self.counters = self.counters.plus(preemptions=1)
            self.waiting.put_back(victim)
        return True

    def _find_victim(self, group: SequenceGroup) -> SequenceGroup | None:
        """The newest group of the client with the most running sequences, if these are more than `group`'s would be.

        A client's only running group is left alone, so that every client that runs goes on.
        """
        num_sequences = self._sequences_of_clients()
        num_groups = Counter(other.request.client for other in self.running)
        clients = [client for client, count in num_groups.items() if count > 1]
        most = max(clients, key=num_sequences.__getitem__, default=None)
        if most is None or num_sequences[most] <= num_sequences[group.request.client] + len(group.sequences):
            return None
        return next(other for other in reversed(self.running) if other.request.client == most)

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
            group.lead.num_cached = group.num_shared_tokens = shared
            self.counters = self.counters.plus(prefix_hits=shared)
        if group.can_share_prefix:
            self.counters = self.counters.plus(prefix_queries=len(group.lead.tokens))
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
        """The next step: all groups that decode, then pieces of prompts; those that compute nothing are left out."""
        decoding, computing = [], []
        for group in self.running:
            if group.lead.is_prefilling or group.is_restoring:
                computing.append(group)
            else:
                decoding.append(ScheduledGroup(group, group.schedule(0)))
        scheduled = [part for part in decoding + self._schedule_prompts(computing) if part.sequences]
        tokens = sum(len(sequence.tokens) for part in scheduled for sequence in part.sequences)
        self.counters = self.counters.plus(tokens=tokens)
        return scheduled

    def _schedule_prompts(self, groups: list[SequenceGroup]) -> list[ScheduledGroup]:
        """As many tokens as a step computes: an equal share for each client, and within it the order of arrival."""
        of_client: dict[int, list[SequenceGroup]] = {}
        for group in groups:
            of_client.setdefault(group.request.client, []).append(group)
        # Whoever needs the least comes first and leaves what is not needed to the others.
        clients = sorted(of_client.values(), key=lambda own: sum(group.lead.num_pending for group in own))
        scheduled, budget = [], self._chunk_size
        for index, own in enumerate(clients):
            share = -(-budget // (len(clients) - index))
            for group in own:
                if share > 0:
                    is_restored = group.is_restoring
                    sequences = group.schedule_restoring(share) if is_restored else group.schedule(share)
                    computed = sum(len(sequence.tokens) for sequence in sequences)
                    share, budget = share - computed, budget - computed
                    scheduled.append(ScheduledGroup(group, sequences, is_restored))
        return scheduled

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
        waiting = self.waiting.remove(request_id)
        running = [group for group in self.running if group.request_id == request_id]
        self.running = [group for group in self.running if group.request_id != request_id]
        for group in running:
            for sequence in group.sequences:
                self.allocator.free(sequence.blocks)
        return waiting + running
