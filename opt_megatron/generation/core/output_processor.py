"""The output processor: from a step's output to the events of every sequence group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...errors import UserError
from ..decoding.best_of import BestOf
from ..decoding.sampling_group import SamplingGroup
from ..decoding.sequences import CopyCache, SequenceGroup
from ..request import Request, TokenEvent
from ..sampling.logits_processors import suppress
from ..sampling.sampler import choose_tokens
from ..step import OutputKind
from .scheduler import ScheduledGroup, Scheduler

_LOGGER = logging.getLogger(__name__)


class OutputProcessor:
    """Gives every group its outputs, and chooses the next tokens of those that sample.

    Args:
        vocab_size: width of the logits.
        suppressed: [ids] int64 that are never chosen.
        isolates_errors: a request that cannot go on ends with "refused" or "failed"; otherwise its error is raised.
    """

    def __init__(
        self, scheduler: Scheduler, copy: CopyCache, vocab_size: int, suppressed: Tensor, *, isolates_errors: bool
    ) -> None:
        self._scheduler, self._copy = scheduler, copy
        self._vocab_size, self._suppressed = vocab_size, suppressed
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

    def process(self, scheduled: list[ScheduledGroup], output: Tensor, kind: OutputKind) -> Iterator[TokenEvent]:
        """The events of a step.

        Args:
            output: of all groups, one row for each token whose logits were asked for.
            kind: of the output, which may contain more than a group needs.

        Raises:
            UserError: a group cannot go on, and errors are not isolated.
        """
        outputs = output.split([sequence.num_logits for group in scheduled for sequence in group.sequences])
        begin = 0
        choosing: list[tuple[SamplingGroup, Tensor]] = []
        for group, sequences in scheduled:
            mine = outputs[begin : begin + len(sequences)]
            begin += len(sequences)
            if group.is_finished:  # its request has ended through an error in this very step
                continue
            if group.is_restoring:
                group.update_restored(sequences)
                continue
            if kind is not OutputKind.ARGMAX:
                mine = self._reduce(mine, group.output_kind)
            if not isinstance(group, SamplingGroup) or group.proposal.tokens:
                yield from self._run(group, partial(group.process_outputs, sequences, mine, self._copy))
                continue
            yield from self._run(group, partial(group.update_cached, sequences[0], mine[0]))
            if not group.lead.num_pending and not group.is_finished:
                choosing.append((group, mine[0][-1]))
        yield from self._choose(choosing)

    def _choose(self, choosing: list[tuple[SamplingGroup, Tensor]]) -> Iterator[TokenEvent]:
        """Choose the next tokens of groups without proposals."""
        sampled = [(group, row) for group, row in choosing if group.output_kind is not OutputKind.ARGMAX]
        tokens = iter(choose_tokens([row for _, row in sampled], [group.sampler_state for group, _ in sampled]))
        for group, row in choosing:
            token = int(row[0]) if group.output_kind is OutputKind.ARGMAX else next(tokens)
            if not group.is_finished:
                yield from self._run(group, partial(self._accept, group, token, row))

    @staticmethod
    def _accept(group: SamplingGroup, token: int | Exception, logits: Tensor) -> list[TokenEvent]:
        if isinstance(token, Exception):
            raise token
        return [group.accept_token(token, logits)]

    def _reduce(self, outputs: tuple[Tensor, ...], kind: OutputKind) -> tuple[Tensor, ...]:
        """What a group would have got alone: a step's output is of the most demanding group's kind."""
        if kind is OutputKind.HIDDEN_STATES:
            return outputs
        logits = [output[:, : self._vocab_size] for output in outputs]
        if kind is OutputKind.LOGITS:
            return tuple(rows.cpu() for rows in logits)
        logits = [suppress(rows, self._suppressed) for rows in logits]
        return tuple(torch.stack((rows.argmax(-1).double(), rows.amax(-1).double()), dim=-1) for rows in logits)

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
