"""The output processor: from a step's output to the events of every sequence group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from ...errors import UserError
from ..decoding.best_of import BestOf
from ..decoding.sampling_group import SamplingGroup
from ..decoding.sequences import CopyCache, SequenceGroup, common_prefix_length
from ..request import Request, TokenEvent
from ..sampling.sampler import choose_tokens, no_token_possible
from ..step import OutputKind
from .launched_step import LaunchedStep
from .scheduler import Scheduler

_LOGGER = logging.getLogger(__name__)


class OutputProcessor:
    """Gives every group its outputs, and chooses the next tokens of those that sample.

    Args:
        vocab_size: width of the logits.
        isolates_errors: a request that cannot go on ends with "refused" or "failed"; otherwise its error is raised.
    """

    def __init__(self, scheduler: Scheduler, copy: CopyCache, vocab_size: int, *, isolates_errors: bool) -> None:
        self._scheduler, self._copy = scheduler, copy
        self._vocab_size = vocab_size
        self._isolates_errors = isolates_errors
        self.best_of: dict[int, BestOf] = {}  # of the unfinished requests that use it

    def add_request(self, request_id: int, request: Request) -> None:
        """Prepare for a request's events."""
        if request.params.best_of is not None:
            self.best_of[request_id] = BestOf(request.params.n, request.params.best_of)

    def cancel_request(self, request_id: int) -> list[TokenEvent]:
        """End a request, waiting or running, and return its last events."""
        groups, best_of = self._scheduler.remove(request_id), self.best_of.pop(request_id, None)
        events = [event for group in groups for event in group.cancel()]
        return best_of.cancel(request_id) if best_of else events

    def process(self, step: LaunchedStep) -> Iterator[TokenEvent]:
        """The events of a step.

        Raises:
            UserError: a group cannot go on, and errors are not isolated.
        """
        choosing: list[tuple[SamplingGroup, Tensor]] = []
        for (group, sequences, is_restored), outputs in zip(step.scheduled, step.read(), strict=True):
            # Restored caches have no outputs. A group that has ended did so through an error of its request in this
            # very step, or with a token that was read after this step had been started.
            if is_restored or group.is_finished:
                continue
            if group.output_kind is OutputKind.LOGITS:  # others in the step may need what follows them
                outputs = [output[..., : self._vocab_size] for output in outputs]
            run = partial(group.process_outputs, sequences, outputs, self._copy)
            if not isinstance(group, SamplingGroup):
                yield from self._run(group, run)
                continue
            if group.proposal.tokens:
                proposed, known = group.proposal.tokens, len(group.lead.tokens)
                events = self._run(group, run)
                self._count_draft(proposed, group.lead.tokens[known:])
                yield from events
                continue
            yield from self._run(group, partial(group.prompt_events, sequences[0], outputs[0]))
            if not group.is_finished and group.is_computed(sequences[0]):
                choosing.append((group, outputs[0][-1]))
        yield from self._choose(choosing)

    def _count_draft(self, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        scheduler = self._scheduler
        scheduler.counters = scheduler.counters.plus(
            drafts=1, draft_tokens=len(proposed), accepted_tokens=common_prefix_length(proposed, accepted)
        )

    def _choose(self, choosing: list[tuple[SamplingGroup, Tensor]]) -> Iterator[TokenEvent]:
        """Accept the next tokens of groups without proposals: those chosen in the step, or chosen here."""
        sampled = [(group, logits) for group, logits in choosing if group.sampling is None]
        tokens = iter(choose_tokens([logits for _, logits in sampled], [group.sampler_state for group, _ in sampled]))
        for group, output in choosing:
            token = next(tokens) if group.sampling is None else int(output)
            if not group.is_finished:
                yield from self._run(group, partial(self._accept, group, token, output))

    @staticmethod
    def _accept(group: SamplingGroup, token: int | Exception, output: Tensor) -> list[TokenEvent]:
        if isinstance(token, Exception):
            raise token
        if token < 0:
            raise no_token_possible()
        return [group.accept_token(token, output if group.sampling is None else None)]

    def _run(self, group: SequenceGroup, action: Callable[[], list[TokenEvent]]) -> list[TokenEvent]:
        """The events of a group's action; if it raises an error, the group's request ends, and no other.

        This is safe for any error, because an action only changes the group itself. (A lost rank, which a copy within
        the cache may notice, stops the engine at the next step.)
        """
        try:
            events = action()
            return self._add_to_best_of(group, events) if self.best_of else events
        except Exception as error:
            for other in self._scheduler.remove(group.request_id):
                other.is_finished = True
            self.best_of.pop(group.request_id, None)
            return [self.error_event(group.request_id, error)]

    def _add_to_best_of(self, group: SequenceGroup, events: list[TokenEvent]) -> list[TokenEvent]:
        best_of = self.best_of.get(group.request_id)
        if best_of is None or not isinstance(group, SamplingGroup):
            return events
        shown = best_of.add(group, events) if events else events
        if best_of.is_finished:
            del self.best_of[group.request_id]
        return shown

    def error_event(self, request_id: int, error: Exception) -> TokenEvent:
        """The last event of a request that cannot go on; raises the error where errors are not isolated."""
        if not self._isolates_errors:
            raise error
        if isinstance(error, UserError):
            return TokenEvent(request_id, None, str(error), "refused")
        _LOGGER.error("request %d failed", request_id, exc_info=error)
        return TokenEvent(request_id, None, f"{type(error).__name__}: {error}", "failed")
