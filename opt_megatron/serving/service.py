"""Jobs on the engine: admission, delivery, the end. All in the event loop's thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from .engine_thread import EngineThread, Status, Timed
from .errors import ApiError, bad_request
from .job import Job, Tracked
from .metrics import Metrics
from .prompts import Prepared
from .served import ServedModel

_LONGEST_RETRY = 60
_SECONDS_TO_STOP = 10.0  # for the engine, when nothing runs any more


class State(Enum):
    """Of the service."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "shutting down"
    ENDED = "stopped"


class EngineStuck(RuntimeError):
    """A step has not come to its end in the time that it may take."""


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Attributes:
        queue_length: continuations, drawn ones included, that wait for a place in the batch.
        body_bytes: of a request.
        request_seconds: from a request's arrival to its last token.
        body_seconds: for a body to arrive.
        step_seconds: for a step of the engine; after that it counts as lost.
        drain_seconds: for what runs when the server is told to stop.
    """

    queue_length: int = 1024
    body_bytes: int = 2 << 20
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    step_seconds: float = 300.0
    drain_seconds: float = 20.0


class Service:
    """The engine for many clients at once.

    Args:
        load: makes the model, in the engine's thread.
        on_served: told when requests are taken.

    Attributes:
        state: of the service.
        error: what ended the engine, if something did.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        limits: Limits,
        metrics: Metrics,
        on_served: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits, self.metrics = limits, metrics
        self.state = State.LOADING
        self.error: BaseException | None = None
        self._load, self._on_served = load, on_served
        self._model: ServedModel | None = None
        self._tracked: dict[int, Tracked] = {}
        self._waiting = 0  # continuations of prompts that have no place in the batch yet
        self._started = 0  # prompts that have one
        self._pace = 1.0  # seconds between the ends of two continuations, lately
        self._last_end = time.monotonic()

    def start(self) -> None:
        """Begin to load the model; called in the event loop's thread."""
        self._idle, self._ended = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._thread = EngineThread(self._load, self)
        self._thread.start()
        self._watch = asyncio.get_running_loop().create_task(self._watch_steps())

    @property
    def model(self) -> ServedModel:
        """What is served.

        Raises:
            ApiError: it is not ready, or not any more.
        """
        self._check_ready()
        return self._model

    def _check_ready(self) -> None:
        if self.state is not State.READY:
            text = "the model is being loaded" if self.state is State.LOADING else f"the server is {self.state.value}"
            raise ApiError(503, text, code="unavailable", headers={"Retry-After": "5"})

    def check_room(self, continuations: int) -> None:
        """Raise ApiError unless so many more continuations may wait."""
        most = self.limits.queue_length
        if continuations > most:
            raise bad_request(
                f"the request asks for {continuations} continuations, and {most} may wait at a time: split it", "n"
            )
        if self._waiting + continuations > most:
            wait = min(_LONGEST_RETRY, max(1, math.ceil(self._waiting * self._pace)))
            raise ApiError(
                429,
                f"{self._waiting} continuations wait and {most} may: try again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )

    def submit(self, prompts: Sequence[Prepared]) -> Job:
        """Give the prompts to the engine.

        Raises:
            ApiError: too much is waiting, or the service takes nothing.
        """
        self._check_ready()
        self.check_room(sum(prompt.request.params.num_drawn for prompt in prompts))
        job = Job(prompts, self._thread.queue.cancel)
        for index, prompt in enumerate(prompts):
            number = self._thread.queue.put(prompt.request)
            job.add(number, index)
            tracked = self._tracked[number] = Tracked(job, prompt, self.metrics)
            self._waiting += tracked.continuations
        if self._idle.is_set():
            self._last_end = time.monotonic()
            self._idle.clear()
        self._show()
        return job

    async def drain(self) -> None:
        """Take no more requests, finish those that run, and stop; what takes too long is cancelled."""
        if self.state is State.ENDED:
            return
        self.state = State.DRAINING
        try:
            await asyncio.wait_for(self._idle.wait(), self.limits.drain_seconds)
        except TimeoutError:
            self._fail_all(ApiError(503, "the server is shutting down", code="unavailable"))
        self._thread.queue.close()
        try:
            await asyncio.wait_for(self._ended.wait(), _SECONDS_TO_STOP)
        except TimeoutError:
            self.on_end(EngineStuck(f"the engine did not stop within {_SECONDS_TO_STOP:g} s"))

    async def ended(self) -> None:
        """Wait until the engine has stopped."""
        await self._ended.wait()

    def on_ready(self, model: ServedModel) -> None:
        """The model is loaded."""
        self._model = model
        if self.state is State.LOADING:
            self.state = State.READY
            self._on_served()

    def on_status(self, status: Status) -> None:
        """Other requests run."""
        for number in status.running:
            tracked = self._tracked.get(number)
            if tracked is not None and not tracked.is_started:
                tracked.start(status.step)
                self._count_start(tracked)
        self.metrics.kv_cache_usage.set(status.kv_cache_usage)
        self._show()

    def on_events(self, events: list[Timed]) -> None:
        """Hand events to their jobs."""
        for timed in events:
            tracked = self._tracked.get(timed.event.request)
            if tracked is None:
                continue
            was_started = tracked.is_started
            ended = tracked.take(timed)
            if not was_started and (tracked.is_started or ended):
                self._count_start(tracked)
            tracked.job.put(timed.event.request, timed.event, ended)
            if ended:
                self._forget(timed.event.request, tracked)
        self._show()

    def on_end(self, error: BaseException | None) -> None:
        """The engine has stopped."""
        if self.state is State.ENDED:
            return
        if error is None and self.state is not State.DRAINING:
            error = RuntimeError("the engine stopped without being told to")
        self.state, self.error = State.ENDED, error
        self._watch.cancel()
        self._fail_all(ApiError(503, "the engine has stopped", code="unavailable"))
        self._ended.set()

    def _count_start(self, tracked: Tracked) -> None:
        self._waiting -= tracked.continuations
        self._started += 1

    def _forget(self, number: int, tracked: Tracked) -> None:
        del self._tracked[number]
        self._started -= 1
        now = time.monotonic()
        spent = (now - self._last_end) / tracked.continuations
        self._pace, self._last_end = 0.9 * self._pace + 0.1 * min(spent, _LONGEST_RETRY), now
        if not self._tracked:
            self._idle.set()

    def _fail_all(self, error: ApiError) -> None:
        for number, tracked in self._tracked.items():
            tracked.job.fail(error)
            self._thread.queue.cancel(number)

    def _show(self) -> None:
        self.metrics.running.set(self._started)
        self.metrics.waiting.set(len(self._tracked) - self._started)

    async def _watch_steps(self) -> None:
        """End when a step takes for ever: a rank may be lost in silence."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.step_seconds / 4))
            spent = self._thread.queue.seconds_in_step
            if self.state in (State.READY, State.DRAINING) and spent > self.limits.step_seconds:
                self.on_end(EngineStuck(f"a step has taken more than {self.limits.step_seconds:g} s: a rank is lost"))
                return
