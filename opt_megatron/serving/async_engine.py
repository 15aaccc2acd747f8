"""`AsyncEngine`: one engine for many concurrent HTTP requests. Everything here runs in the event loop's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

from ..generation.step import BLOCK_SIZE
from .admission import AdmissionQueue
from .engine_requests import EngineRequest
from .engine_thread import EngineThread, SchedulerStats, TimedEvent
from .errors import ApiError
from .limits import Limits
from .metrics import Metrics
from .request_output import OutputCollector
from .request_state import RequestState
from .served_model import ServedModel

_STOP_SECONDS = 10.0  # for the engine to stop when no request runs any more


class EngineState(Enum):
    """The state of an `AsyncEngine`; the values are what /health reports."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "shutting down"
    STOPPED = "stopped"


class EngineTimeoutError(RuntimeError):
    """A step of the engine, or its end, takes longer than it may."""


class AsyncEngine:
    """Takes requests, hands the engine's events to their readers, and stops the engine when requests are done.

    Args:
        load: makes the model, in the engine's thread.
        on_ready: called when requests are taken.

    Attributes:
        state: changes from LOADING to READY to DRAINING to STOPPED; an error leads to STOPPED from any of them.
        error: what stopped the engine, if an error did.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        limits: Limits,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits, self.metrics = limits, metrics
        self.state = EngineState.LOADING
        self.error: BaseException | None = None
        self._load, self._on_ready = load, on_ready
        self._model: ServedModel | None = None
        self._admission = AdmissionQueue(limits.queue_length)
        self._requests: dict[int, RequestState] = {}  # the unfinished ones, by the engine's number
        self._lost_rank: str | None = None
        self._num_started = 0  # of the unfinished requests, those with a place in the batch
        self._num_clients = 0  # so far

    def start(self) -> None:
        """Begin to load the model; to be called in the event loop's thread."""
        self._idle, self._stopped = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._thread = EngineThread(self._load, self)
        self._thread.start()
        self._step_watchdog = asyncio.get_running_loop().create_task(self._watch_steps())

    @property
    def model(self) -> ServedModel:
        """The model.

        Raises:
            ApiError: 503, it is still being loaded, or the server shuts down.
        """
        if self.state is not EngineState.READY or self._model is None:
            loading = self.state is EngineState.LOADING
            message = "the model is being loaded" if loading else f"the server is {self.state.value}"
            raise ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})
        return self._model

    @property
    def num_requests(self) -> int:
        """The number of prompts that are waiting or running."""
        return len(self._requests)

    def check_queue(self, continuations: int) -> None:
        """Raise ApiError unless this many more continuations may wait (`AdmissionQueue.check`)."""
        self._admission.check(continuations)

    def submit(self, requests: Sequence[EngineRequest]) -> OutputCollector:
        """Queue the requests of one HTTP request, which have one share of the batch together.

        Returns:
            What collects their events.

        Raises:
            ApiError: the queue is too full, or the server takes no requests.
        """
        _ = self.model  # raises unless the engine is ready
        self.check_queue(sum(item.request.params.num_sampled for item in requests))
        output = OutputCollector(self._thread.queue.cancel)
        self._num_clients += 1
        for index, item in enumerate(requests):
            request = replace(item.request, client=self._num_clients)
            number = self._thread.queue.put(request)
            output.add_request(number, index)
            self._requests[number] = state = RequestState(output, request, self.metrics)
            self._admission.add(request.client, state.num_continuations)
        if self._idle.is_set():
            self._admission.end_idle_time()
            self._idle.clear()
        self._update_gauges()
        return output

    def lose_rank(self, message: str) -> None:
        """Stop soon with this message: a rank gives no sign of life. May be called in any thread."""
        self._lost_rank = message

    async def drain(self) -> None:
        """Take no more requests, wait for the running ones up to `limits.drain_seconds`, and stop the engine."""
        if self.state is EngineState.STOPPED:
            return
        self.state = EngineState.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), self.limits.drain_seconds)
        except TimeoutError:
            self._fail_all(ApiError(503, "the server is shutting down", code="unavailable"))
        self._thread.queue.close()
        try:
            await asyncio.wait_for(self._stopped.wait(), _STOP_SECONDS)
        except TimeoutError:
            self.on_stopped(EngineTimeoutError(f"the engine did not stop within {_STOP_SECONDS:g} s"))

    async def wait_until_stopped(self) -> None:
        """Return when the engine has stopped, for whatever reason."""
        await self._stopped.wait()

    def on_model_loaded(self, model: ServedModel) -> None:
        """Take requests from now on, unless the server shuts down already."""
        self._model = model
        self.metrics.set_cache_config(BLOCK_SIZE, model.engine.num_cache_blocks)
        if self.state is EngineState.LOADING:
            self.state = EngineState.READY
            self._on_ready()

    def on_stats(self, stats: SchedulerStats) -> None:
        """Note which requests got a place in the batch."""
        for number in stats.running:
            request = self._requests.get(number)
            if request is not None and not request.is_started:
                request.start(stats.step_start)
                self._count_started(request)
        self.metrics.kv_cache_usage.set(stats.kv_cache_usage)
        self.metrics.count_steps(stats.counters)
        self._update_gauges()

    def on_events(self, events: list[TimedEvent]) -> None:
        """Hand events to the readers of their requests."""
        for timed in events:
            number = timed.event.request
            request = self._requests.get(number)
            if request is None:
                continue
            was_started = request.is_started
            is_last = request.record(timed)
            if not was_started and (request.is_started or is_last):
                self._count_started(request)
            request.output.add_event(number, timed.event, is_last)
            if is_last:
                self._remove(number, request)
        self._update_gauges()

    def on_stopped(self, error: BaseException | None) -> None:
        """Let every unfinished request fail; nothing runs from now on."""
        if self.state is EngineState.STOPPED:
            return
        if error is None and self.state is not EngineState.DRAINING:
            error = RuntimeError("the engine stopped unexpectedly")
        self.state, self.error = EngineState.STOPPED, error
        self._step_watchdog.cancel()
        self._fail_all(ApiError(503, "the engine has stopped", code="unavailable"))
        self._stopped.set()

    def _count_started(self, request: RequestState) -> None:
        self._admission.start(request.client, request.num_continuations)
        self._num_started += 1

    def _remove(self, number: int, request: RequestState) -> None:
        del self._requests[number]
        self._num_started -= 1
        self._admission.finish(request.num_continuations)
        if not self._requests:
            self._idle.set()

    def _fail_all(self, error: ApiError) -> None:
        for number, request in self._requests.items():
            request.output.fail(error)
            self._thread.queue.cancel(number)

    def _update_gauges(self) -> None:
        self.metrics.set_requests(self._num_started, len(self._requests) - self._num_started)

    async def _watch_steps(self) -> None:
        """Stop when a step takes too long, or a rank is lost: it may have died without closing its connections."""
        limit = self.limits.step_seconds
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            running = self.state in (EngineState.READY, EngineState.DRAINING)
            message = self._lost_rank
            if message is None and running and self._thread.queue.seconds_in_step > limit:
                message = f"a step has taken more than {limit:g} s: a rank is lost"
            if message is not None:
                self.on_stopped(EngineTimeoutError(message))
                return
