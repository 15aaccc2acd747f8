"""`AdmissionQueue`: counts the continuations that wait for a place in the batch, and refuses more than may wait."""

from __future__ import annotations

import math
import time
from collections import Counter

from .errors import ApiError, bad_request

_MAX_RETRY_SECONDS = 60


class AdmissionQueue:
    """Bounds the queue in front of the batch.

    A client is one HTTP request: a connection has one at a time. Where the queue is full, a client may still add its
    share, the capacity divided by the clients that wait, so that one large request does not shut out the others.

    Args:
        capacity: continuations that may wait at a time.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: Counter[int] = Counter()  # continuations of each client that waits
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
        waiting, share = self._waiting.total(), self._capacity // (len(self._waiting) + 1)
        if waiting + continuations > self._capacity and continuations > share:
            seconds = min(_MAX_RETRY_SECONDS, max(1, math.ceil(waiting * self._seconds_each)))
            raise ApiError(
                429,
                f"{waiting} continuations wait and {self._capacity} may: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def add(self, client: int, continuations: int) -> None:
        """Count continuations that begin to wait."""
        self._waiting[client] += continuations

    def start(self, client: int, continuations: int) -> None:
        """Count continuations that got a place in the batch and wait no longer."""
        self._waiting[client] -= continuations
        if not self._waiting[client]:
            del self._waiting[client]

    def finish(self, continuations: int) -> None:
        """Learn from continuations that finished how fast the queue moves."""
        now = time.monotonic()
        spent = (now - self._last_end) / continuations
        self._seconds_each = 0.9 * self._seconds_each + 0.1 * min(spent, _MAX_RETRY_SECONDS)
        self._last_end = now

    def end_idle_time(self) -> None:
        """Leave out the time in which the engine had nothing to do from what `finish` learns."""
        self._last_end = time.monotonic()
