"""The state of decoding: a sequence group is one continuation of a request, with the cached sequences it needs.

Sampling needs one sequence (`sampling_group.py`), beam search and contrastive search (`beam_search.py`,
`contrastive_search.py`) several with a common prefix. In every step each group schedules its
tokens, the engine runs all of them in one forward pass, and each group turns its outputs into events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..request import Request, TokenEvent
from ..sampling.batch_sampler import SamplingRow
from ..step import NEWEST, NO_BLOCKS, KVCacheBlocks, OutputKind, ScheduledSequence


@dataclass(eq=False)
class CachedSequence:
    """Tokens, and how many of them have their keys and values in the cache.

    Attributes:
        blocks: empty until the sequence's group is admitted.
        num_cached: tokens in the model's cache, those of a step that is running included.
        num_unread: tokens that follow `tokens`, are chosen in steps that are running, and are still to be read.
        num_to_restore: tokens that were in the cache when the group was preempted.
        num_draft_cached: tokens in the draft model's cache, where the sequence has the same blocks.
    """

    tokens: list[int]
    blocks: KVCacheBlocks = NO_BLOCKS
    num_cached: int = 0
    num_draft_cached: int = 0
    num_to_restore: int = 0
    num_unread: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) + self.num_unread - self.num_cached

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is still to be computed."""
        return self.num_pending > 1

    def schedule(
        self, count: int, num_logits: int, proposed: Sequence[int] = (), sampling: SamplingRow | None = None
    ) -> ScheduledSequence:
        """The next `count` pending tokens, followed by proposed ones."""
        tokens = self.tokens[self.num_cached : self.num_cached + count] or (NEWEST,)
        return ScheduledSequence(self.blocks, self.num_cached, (*tokens, *proposed), num_logits, sampling)


# copy(source, target, begin, end): tokens [begin, end) of one sequence's keys and values to another's.
CopyCache = Callable[[CachedSequence, CachedSequence, int, int], None]


class SequenceGroup(ABC):
    """One continuation of a request, or several under one search; the base class of all searches.

    Attributes:
        request_id: the request's number, which its events carry.
        choice: which of the request's continuations.
        max_length: tokens of KV cache that each sequence may need.
        sequences: as many as the group may need at a time.
        lead: the first of them, which holds the prompt.
        output_kind: what its outputs must contain, where it chooses tokens itself.
        num_shared_tokens: of the prompt, those that were copied from another sequence's cache instead of computed.
        can_share_prefix: a prefix of the prompt may be copied from another sequence's cache.
        is_finished: the last event has been made.
    """

    output_kind = OutputKind.LOGITS
    can_share_prefix = True

    def __init__(self, request_id: int, request: Request, choice: int, num_sequences: int, max_length: int) -> None:
        self.request_id, self.request, self.choice, self.max_length = request_id, request, choice, max_length
        self.sequences = [CachedSequence(list(request.prompt)) for _ in range(num_sequences)]
        self.lead = self.sequences[0]
        self.num_shared_tokens = 0
        self.is_finished = False

    @abstractmethod
    def schedule(self, budget: int) -> list[ScheduledSequence]:
        """What to compute in the next step, for the first ones of `sequences`; of a prompt at most `budget` tokens."""

    @abstractmethod
    def process_outputs(
        self, scheduled: Sequence[ScheduledSequence], outputs: Sequence[Tensor], copy: CopyCache
    ) -> list[TokenEvent]:
        """Continue with the outputs of what was scheduled.

        Args:
            outputs: for each sequence the tokens chosen in the step, [num_logits] int64, or rows [num_logits, ...]
                (see `StepOutput`), on the CPU.

        Raises:
            UserError: the options leave no possible continuation.
        """

    def preempt(self) -> None:
        """Give up all blocks; what they held is computed again (`schedule_restoring`) when the group has new ones."""
        for sequence in self.sequences:
            sequence.num_to_restore = max(sequence.num_cached, sequence.num_to_restore)
            sequence.blocks, sequence.num_cached, sequence.num_draft_cached = NO_BLOCKS, 0, 0

    @property
    def is_restoring(self) -> bool:
        """Whether the caches do not yet hold what they held when the group was preempted; nothing else runs before."""
        return any(sequence.num_cached < sequence.num_to_restore for sequence in self.sequences)

    def schedule_restoring(self, budget: int) -> list[ScheduledSequence]:
        """At most `budget` of the tokens to restore, without outputs."""
        scheduled: list[ScheduledSequence] = []
        for sequence in self.sequences:
            count = min(sequence.num_to_restore - sequence.num_cached, budget)
            if count > 0:
                scheduled.append(sequence.schedule(count, 0))
                budget -= count
        return scheduled

    def mark_computed(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """Count the tokens of a step that has been started as cached."""
        counts = {part.blocks: len(part.tokens) for part in scheduled}
        for sequence in self.sequences:
            sequence.num_cached += counts.get(sequence.blocks, 0)

    def cancel(self) -> list[TokenEvent]:
        """End the group, and return its last events."""
        self.is_finished = True
        return [TokenEvent(self.request_id, None, "", "cancelled", self.choice)]


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared
