"""`RequestState`: the progress of one engine request, and the times that its metrics need."""

from __future__ import annotations

import time
from collections import Counter

from ..generation.request import Request
from .engine_thread import TimedEvent
from .metrics import Metrics
from .request_output import OutputCollector

# The engine's finish reasons that vLLM's metric `request_success` calls by other names.
_METRIC_REASONS = {"cancelled": "abort", "refused": "error", "failed": "error"}


class RequestState:
    """The state of one prompt in the engine.

    Attributes:
        output: gets the events of the request.
        client: see `Request`.
        is_started: the request has, or had, a place in the batch.
        num_continuations: continuations that the engine generates for it (`best_of`).
    """

    def __init__(self, output: OutputCollector, request: Request, metrics: Metrics) -> None:
        self.output = output
        self.client = request.client
        self.is_started = False
        self.num_continuations = request.params.num_sampled
        self._request = request
        self._num_unfinished = request.params.n  # of the continuations that are returned
        self._num_tokens: Counter[int] = Counter()  # generated so far, by the choice
        self._is_prefilled = False
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._start = self._first_token = self._arrival
        self._last_token: dict[int, float] = {}  # choice -> when its latest token was generated
        metrics.prompt_tokens.inc(len(request.prompt))

    def start(self, moment: float) -> None:
        """Record that the request got a place in the batch at `moment`."""
        self.is_started, self._start = True, moment
        self._metrics.queue_time.observe(max(0.0, moment - self._arrival))

    def record(self, timed: TimedEvent) -> bool:
        """Record an event; return whether it is the last one of the request."""
        moment, event, step_start = timed
        if not self.is_started and event.token is not None:
            self.start(step_start)
        if not (event.is_prompt or self._is_prefilled or event.finish_reason in _METRIC_REASONS):
            self._is_prefilled = True
            self._metrics.count_prefill(len(self._request.prompt), event.num_cached_tokens)
        if event.token is not None and not event.is_prompt:
            self._record_token(moment, event.choice)
        if event.finish_reason is None:
            return False
        if event.finish_reason in ("refused", "failed"):  # one event ends all continuations
            self._num_unfinished = 0
        else:
            self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self._metrics.count_finished(_METRIC_REASONS.get(event.finish_reason, event.finish_reason))
            self._record_end(moment)
        return self._num_unfinished == 0

    def _record_end(self, moment: float) -> None:
        metrics, params = self._metrics, self._request.params
        metrics.e2e_request_latency.observe(moment - self._arrival)
        metrics.request_prompt_tokens.observe(len(self._request.prompt))
        metrics.request_generation_tokens.observe(self._num_tokens.total())
        metrics.max_generation_tokens.observe(max(self._num_tokens.values(), default=0))
        metrics.params_n.observe(params.n)
        metrics.params_max_tokens.observe(params.max_new_tokens)
        if self.is_started:
            metrics.inference_time.observe(moment - self._start)
        if self._last_token:
            metrics.prefill_time.observe(self._first_token - self._start)
            metrics.decode_time.observe(moment - self._first_token)
            num_later = max(self._num_tokens.values()) - 1
            metrics.time_per_output_token.observe((moment - self._first_token) / num_later if num_later else 0.0)

    def _record_token(self, moment: float, choice: int) -> None:
        self._num_tokens[choice] += 1
        self._metrics.generation_tokens.inc()
        if choice in self._last_token:
            self._metrics.inter_token_latency.observe(moment - self._last_token[choice])
        elif not self._last_token:
            self._first_token = moment
            self._metrics.time_to_first_token.observe(moment - self._arrival)
        self._last_token[choice] = moment
