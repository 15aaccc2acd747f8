"""`AdmissionQueue`: counts the continuations that wait for a place in the batch, and refuses more than may wait."""

from __future__ import annotations

import math
import time

from .errors import ApiError, bad_request

_MAX_RETRY_SECONDS = 60


class AdmissionQueue:
    """Bounds the queue in front of the batch.

    Args:
        capacity: continuations that may wait at a time.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting = 0
        self._seconds_each = 1.0  # moving average of the time between the ends of two continuations
        self._last_end = time.monotonic()

    def check(self, continuations: int) -> None:
        """Check that this many more continuations may wait.

        Raises:
            ApiError: 400, more than may ever wait; 429 with `Retry-After`, the queue is too full at present.
        """
        if continuations > self._capacity:
            raise bad_request(
                f"the request asks for {continuations} continuations, and {self._capacity} may wait at a time: "
                "split it",
                "n",
            )
        if self._waiting + continuations > self._capacity:
            seconds = min(_MAX_RETRY_SECONDS, max(1, math.ceil(self._waiting * self._seconds_each)))
            raise ApiError(
                429,
                f"{self._waiting} continuations wait and {self._capacity} may: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def add(self, continuations: int) -> None:
        """Count continuations that begin to wait."""
        self._waiting += continuations

    def start(self, continuations: int) -> None:
        """Count continuations that got a place in the batch and wait no longer."""
        self._waiting -= continuations

    def finish(self, continuations: int) -> None:
        """Learn from continuations that finished how fast the queue moves."""
        now = time.monotonic()
        spent = (now - self._last_end) / continuations
        self._seconds_each = 0.9 * self._seconds_each + 0.1 * min(spent, _MAX_RETRY_SECONDS)
        self._last_end = now

    def end_idle_time(self) -> None:
        """Leave out the time in which the engine had nothing to do from what `finish` learns."""
        self._last_end = time.monotonic()
