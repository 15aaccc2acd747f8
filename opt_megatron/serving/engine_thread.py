"""The thread that loads the model and runs the engine, and reports to an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ..generation.core.request_queue import RequestQueue
from ..generation.core.scheduler import SchedulerCounters
from ..generation.request import Request, TokenEvent
from .served_model import ServedModel

# The engine waits no longer than this for requests before it exchanges a message with the other ranks, so that
# an idle server notices a lost rank soon.
_IDLE_WAIT_SECONDS = 5.0


class TimedEvent(NamedTuple):
    """An event of the engine with its times, both in seconds of `time.perf_counter`.

    Attributes:
        time: when the event happened.
        step_start: when the engine's step began that made it.
    """

    time: float
    event: TokenEvent
    step_start: float


class SchedulerStats(NamedTuple):
    """The state of the scheduler in one step.

    Attributes:
        running: numbers of the requests that are in the batch.
        kv_cache_usage: used part of the KV cache, from 0 to 1.
        step_start: when the step began, in seconds of `time.perf_counter`.
        counters: what the scheduler has done so far.
    """

    running: frozenset[int]
    kv_cache_usage: float
    step_start: float
    counters: SchedulerCounters


class EngineListener(Protocol):
    """Receives the reports of an `EngineThread`, in the event loop's thread."""

    def on_model_loaded(self, model: ServedModel) -> None:
        """Called once, when the engine can take requests."""

    def on_stats(self, stats: SchedulerStats) -> None:
        """Called after every step, and when other requests run than before."""

    def on_events(self, events: list[TimedEvent]) -> None:
        """Called with the events since the last call."""

    def on_stopped(self, error: BaseException | None) -> None:
        """Called once, when the engine has stopped: with the error that stopped it, or None after `queue.close`."""


class MonitoredRequestQueue(RequestQueue):
    """A request queue that shows how long the engine has been in its current step.

    The engine drains the queue before every step and waits on it when there is nothing to do, so the time between
    these calls is the time of a step.

    Args:
        on_step: called in the engine's thread before every step and every wait.
    """

    def __init__(self, on_step: Callable[[], None]) -> None:
        super().__init__()
        self._step_began: float | None = None  # None while the engine waits for requests
        self._on_step = on_step

    @property
    def seconds_in_step(self) -> float:
        """How long the current step has taken so far; 0 while the engine waits for requests."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def drain(self) -> tuple[list[tuple[int, Request]], set[int]]:
        """As `RequestQueue.drain`; a new step begins."""
        self._step_began = time.monotonic()
        self._on_step()
        return super().drain()

    def wait(self, seconds: float) -> bool:
        """As `RequestQueue.wait`, for at most a few seconds."""
        self._on_step()  # the requests that ended in the last step no longer run
        self._step_began = None
        try:
            return super().wait(min(seconds, _IDLE_WAIT_SECONDS))
        finally:
            self._step_began = time.monotonic()


class EngineThread:
    """Loads a model and runs its engine in a thread; to be made and started in the event loop's thread.

    Args:
        load: makes the model, in the new thread; an error that it raises goes to `listener.on_stopped`.

    Attributes:
        queue: where requests for the engine go; closing it stops the engine.
    """

    def __init__(self, load: Callable[[], ServedModel], listener: EngineListener) -> None:
        self._load, self._listener = load, listener
        self._loop = asyncio.get_running_loop()
        self._events: deque[TimedEvent] = deque()
        self._delivery_is_scheduled = False
        self._stats = SchedulerStats(frozenset(), 0.0, 0.0, SchedulerCounters())
        self._step_start = 0.0
        self._model: ServedModel | None = None
        self.queue = MonitoredRequestQueue(self._report_stats)
        # A daemon thread, because the engine may wait forever for a rank that no longer answers.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which begins to load the model."""
        self._thread.start()

    def _run(self) -> None:
        error = None
        try:
            self._model = self._load()
            self._call_in_loop(self._listener.on_model_loaded, self._model)
            for event in self._model.engine.generate(self.queue):
                self._events.append(TimedEvent(time.perf_counter(), event, self._step_start))
                if not self._delivery_is_scheduled:
                    self._delivery_is_scheduled = True
                    self._call_in_loop(self._deliver_events)
        except BaseException as caught:
            error = caught
        self._call_in_loop(self._listener.on_stopped, error)

    def _report_stats(self) -> None:
        assert self._model is not None  # only its engine calls this
        engine = self._model.engine
        running, counters = frozenset(engine.running_requests), engine.counters
        if (running, counters) != (self._stats.running, self._stats.counters):
            self._stats = SchedulerStats(running, engine.kv_cache_usage, self._step_start, counters)
            self._call_in_loop(self._listener.on_stats, self._stats)
        self._step_start = time.perf_counter()  # requests that are queued by now can join the next step

    def _deliver_events(self) -> None:
        # Reset before the events are read: an event that comes later schedules another delivery.
        self._delivery_is_scheduled = False
        events = [self._events.popleft() for _ in range(len(self._events))]
        if events:
            self._listener.on_events(events)

    def _call_in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the server has ended
            return
