"""The queue through which requests reach a running engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from ..request import Request


class RequestQueue:
    """A queue that any thread puts requests into, and that the engine drains between steps.

    Args:
        requests: the first ones.
    """

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        self._changed = threading.Condition()
        self._arrived: deque[tuple[int, Request]] = deque(enumerate(requests))
        self._num_requests = len(self._arrived)
        self._cancelled: set[int] = set()
        self._is_closed = False

    def put(self, request: Request) -> int:
        """Add a request.

        Returns:
            its id, which its events carry: the number of requests before it.

        Raises:
            RuntimeError: the queue is closed.
        """
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the queue is closed")
            request_id, self._num_requests = self._num_requests, self._num_requests + 1
            self._arrived.append((request_id, request))
            self._changed.notify()
            return request_id

    def cancel(self, request_id: int) -> None:
        """End a request, waiting or running; without effect on one that has ended already."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def close(self) -> None:
        """No more requests will come: the engine ends when all are done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def drain(self) -> tuple[list[tuple[int, Request]], set[int]]:
        """The requests that have arrived since the last call, with their ids, and the ids of those cancelled."""
        with self._changed:
            arrived, cancelled = list(self._arrived), self._cancelled
            self._arrived.clear()
            self._cancelled = set()
            return arrived, cancelled

    def wait(self, seconds: float) -> bool:
        """Wait until something has arrived, or was cancelled, or the queue is closed; False after `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._arrived or self._cancelled or self._is_closed), seconds)

    @property
    def is_exhausted(self) -> bool:
        """Closed, and all requests were drained."""
        with self._changed:
            return self._is_closed and not self._arrived
