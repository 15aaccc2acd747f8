"""One client's request: the engine requests that it became, and what has come of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..generation.request import TokenEvent
from .engine_thread import Timed
from .errors import ApiError
from .metrics import Metrics
from .prompts import Prepared


class Arrival(NamedTuple):
    """An event of the job's prompt number `index` (from 0)."""

    index: int
    event: TokenEvent


class Job:
    """Events of several prompts in the order in which they happen.

    Args:
        cancel: ends one of them in the engine.
    """

    def __init__(self, prompts: Sequence[Prepared], cancel: Callable[[int], None]) -> None:
        self._prompts = prompts
        self._cancel = cancel
        self._numbers: dict[int, int] = {}  # the engine's number of what has not ended -> index
        self._arrived: deque[Arrival] = deque()
        self._changed = asyncio.Event()
        self._error: ApiError | None = None

    def add(self, number: int, index: int) -> None:
        """Tell what the engine calls a prompt."""
        self._numbers[number] = index

    def put(self, number: int, event: TokenEvent, ended: bool) -> None:
        """Take an event of a prompt, its last one if `ended`."""
        index = self._numbers[number]
        if ended:
            del self._numbers[number]
        self._arrived.append(Arrival(index, event))
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """End with an error, which whoever waits for events gets."""
        self._error = self._error or error
        self._changed.set()

    def cancel(self) -> None:
        """End all that has not ended; nothing more is heard of it."""
        for number in list(self._numbers):
            self._cancel(number)

    async def events(self) -> list[Arrival]:
        """What has arrived since the last call, after waiting for something; empty at the end.

        Raises:
            ApiError: the job cannot go on.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._numbers:
                return []
            self._changed.clear()
            await self._changed.wait()
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived


class Tracked:
    """One prompt in the engine: how far it is, and its times for the metrics."""

    def __init__(self, job: Job, prepared: Prepared, metrics: Metrics) -> None:
        self.job = job
        self.is_started = False
        self.continuations = prepared.request.params.num_drawn
        self._open = prepared.request.params.n  # those that are told of
        self._metrics = metrics
        self._born = time.perf_counter()
        self._latest: dict[int, float] = {}  # of each continuation, when its latest token came
        metrics.prompt_tokens.inc(len(prepared.request.prompt))

    def start(self, moment: float) -> None:
        """It has a place in the batch."""
        self.is_started = True
        self._metrics.queue_time.observe(max(0.0, moment - self._born))

    def take(self, timed: Timed) -> bool:
        """Count an event; whether it was the last."""
        moment, event, step = timed
        if not self.is_started and event.token is not None:
            self.start(step)
        if event.token is not None and not event.is_prompt:
            self._count_token(moment, event.choice)
        if event.finish_reason is None:
            return False
        self._open = 0 if event.finish_reason in ("refused", "failed") else self._open - 1
        if self._open == 0:
            self._count_end(moment, event.finish_reason)
        return self._open == 0

    def _count_token(self, moment: float, choice: int) -> None:
        self._metrics.generation_tokens.inc()
        if choice in self._latest:
            self._metrics.between_tokens.observe(moment - self._latest[choice])
        elif not self._latest:
            self._metrics.first_token.observe(moment - self._born)
        self._latest[choice] = moment

    def _count_end(self, moment: float, reason: str) -> None:
        self._metrics.finished({"cancelled": "abort", "refused": "error", "failed": "error"}.get(reason, reason))
        self._metrics.whole.observe(moment - self._born)
