"""The thread that loads the model and runs the engine, and hands what it says to an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ..generation.core.request_queue import RequestQueue
from ..generation.request import TokenEvent
from .served import ServedModel

_SECONDS_BETWEEN_SIGNS = 5.0  # while nothing is asked for: how soon a lost rank is noticed


class Timed(NamedTuple):
    """An event, when it happened, and when the step began in which it did (time.perf_counter)."""

    time: float
    event: TokenEvent
    step: float


class Status(NamedTuple):
    """The engine's state in a step: requests that have rows, part of the cache in use, when the step began."""

    running: frozenset[int]
    kv_cache_usage: float
    step: float


class Listener(Protocol):
    """Who is told, in the event loop's thread."""

    def on_ready(self, model: ServedModel) -> None:
        """The model is loaded and takes requests."""

    def on_status(self, status: Status) -> None:
        """Another set of requests runs."""

    def on_events(self, events: list[Timed]) -> None:
        """What was generated since the last call."""

    def on_end(self, error: BaseException | None) -> None:
        """The engine has stopped: asked to, or by an error."""


class WatchedQueue(RequestQueue):
    """A queue that tells when the engine looks into it, which it does before every step, and how long a step takes."""

    def __init__(self, on_look: Callable[[], None]) -> None:
        super().__init__()
        self._begun: float | None = None  # when the step began that has not ended
        self._on_look = on_look

    @property
    def seconds_in_step(self) -> float:
        """How long the engine has not been seen here: 0 while it waits for something to do."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def take(self) -> tuple[list, set[int]]:
        """As RequestQueue's."""
        self._begun = time.monotonic()
        self._on_look()
        return super().take()

    def wait(self, seconds: float) -> bool:
        """As RequestQueue's, but not for long: in between the engine sends a sign to the other ranks."""
        self._on_look()  # what has ended since the last step
        self._begun = None
        try:
            return super().wait(min(seconds, _SECONDS_BETWEEN_SIGNS))
        finally:
            self._begun = time.monotonic()


class EngineThread:
    """Loads the model and runs the engine in a thread of its own; made and started in the event loop's thread.

    Args:
        load: makes the model; what it raises goes to `on_end`.
    """

    def __init__(self, load: Callable[[], ServedModel], listener: Listener) -> None:
        self._load, self._listener = load, listener
        self._loop = asyncio.get_running_loop()
        self._said: deque[Timed] = deque()
        self._is_called = False  # the loop has been asked to fetch what was said
        self._status = Status(frozenset(), 0.0, 0.0)
        self._step = 0.0  # when the latest began
        self._model: ServedModel | None = None
        self.queue = WatchedQueue(self._look)
        # A daemon: a rank that is lost in silence may keep it waiting for ever.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end, and say whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        error = None
        try:
            self._model = self._load()
            self._tell(self._listener.on_ready, self._model)
            for event in self._model.engine.generate(self.queue):
                self._said.append(Timed(time.perf_counter(), event, self._step))
                if not self._is_called:
                    self._is_called = True
                    self._tell(self._fetch)
        except BaseException as caught:
            error = caught
        self._tell(self._listener.on_end, error)

    def _look(self) -> None:
        engine = self._model.engine
        running = frozenset(engine.running_requests)
        if running != self._status.running:
            self._status = Status(running, engine.kv_cache_usage, self._step)
            self._tell(self._listener.on_status, self._status)
        self._step = time.perf_counter()  # what was put until now is admitted next

    def _fetch(self) -> None:
        self._is_called = False  # first: what is said from here on asks for another call
        events = [self._said.popleft() for _ in range(len(self._said))]
        if events:
            self._listener.on_events(events)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return
