"""`best_of`: of several sampled continuations of a request the likeliest are returned."""

from __future__ import annotations

from dataclasses import replace

from ..request import TokenEvent
from .sampling_group import SamplingGroup


class BestOf:
    """Collects the events of a request's continuations until all have ended, and returns those of the `n` likeliest.

    As in metaseq, samples are independent and ranked by the sum of their tokens' log-probabilities.
    """

    def __init__(self, n: int, best_of: int) -> None:
        self._n, self._num_unfinished = n, best_of
        self._events: dict[int, list[TokenEvent]] = {}
        self._logprob_sums: dict[int, float] = {}

    def add(self, group: SamplingGroup, events: list[TokenEvent]) -> list[TokenEvent]:
        """Add new events of a continuation; returns what can be shown now: the prompt's, and at the end the best."""
        of_prompt = [event for event in events if event.is_prompt]
        self._events.setdefault(group.choice, []).extend(event for event in events if not event.is_prompt)
        self._logprob_sums[group.choice] = group.logprob_sum
        if not group.is_finished:
            return of_prompt
        self._num_unfinished -= 1
        return of_prompt + (self._best(group.request.params.logprobs is None) if self.is_finished else [])

    @property
    def is_finished(self) -> bool:
        """All continuations have ended."""
        return self._num_unfinished == 0

    def cancel(self, request_id: int) -> list[TokenEvent]:
        """The last events of a request that is cancelled, without any token of its continuations."""
        return [TokenEvent(request_id, None, "", "cancelled", choice) for choice in range(self._n)]

    def _best(self, hide_logprobs: bool) -> list[TokenEvent]:
        best = sorted(self._logprob_sums, key=lambda choice: -self._logprob_sums[choice])[: self._n]
        return [
            replace(event, choice=rank, logprob=None if hide_logprobs else event.logprob)
            for rank, choice in enumerate(best)
            for event in self._events[choice]
        ]
