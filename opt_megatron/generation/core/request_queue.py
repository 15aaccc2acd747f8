"""Requests that arrive while others run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from ..request import Request


class RequestQueue:
    """Where any thread puts requests, and the engine takes them between steps.

    Args:
        requests: the first ones.
    """

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        self._changed = threading.Condition()
        self._fresh: deque[tuple[int, Request]] = deque(enumerate(requests))
        self._count = len(self._fresh)
        self._cancelled: set[int] = set()
        self._is_closed = False

    def put(self, request: Request) -> int:
        """Add a request; its number is what its events carry. Not after `close`."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the queue is closed")
            number, self._count = self._count, self._count + 1
            self._fresh.append((number, request))
            self._changed.notify()
            return number

    def cancel(self, number: int) -> None:
        """End a request, wherever it stands; of one that has ended already nothing more is heard."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify()

    def close(self) -> None:
        """No more requests will come: the engine ends when all are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def take(self) -> tuple[list[tuple[int, Request]], set[int]]:
        """What has arrived and what has been cancelled since the last call."""
        with self._changed:
            fresh, cancelled = list(self._fresh), self._cancelled
            self._fresh.clear()
            self._cancelled = set()
            return fresh, cancelled

    def wait(self, seconds: float) -> bool:
        """Wait for something to happen, and say whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._fresh or self._cancelled or self._is_closed), seconds)

    @property
    def is_drained(self) -> bool:
        """Closed, and everything was taken."""
        with self._changed:
            return self._is_closed and not self._fresh
