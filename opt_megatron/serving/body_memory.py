"""`BodyMemory`: bounds the memory that the bodies of all requests take together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Smaller bodies are not counted, so that ordinary requests are served whatever the others do; the limit on connections
# bounds them.
SMALL_BODY = 64 << 10


@dataclass(eq=False)
class Reservation:
    """The memory of one body.

    Attributes:
        timeout: ends the body's arrival.
        is_withdrawn: the body had to make room for others, and its time was ended.
    """

    size: int = 0
    timeout: asyncio.Timeout | None = None
    is_withdrawn: bool = False


class BodyMemory:
    """Counts the bodies of requests that arrive or are being answered: as long, the framework keeps them.

    Where a body does not fit, the one that has been arriving for the longest time is refused. That is a slow client's
    rather than that of a client who sends a large body in one go.

    Args:
        max_bytes: of all bodies together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0
        self._arriving: dict[Reservation, None] = {}  # in the order in which they began to be counted

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """A body's reservation, without any memory yet; leaving the context returns its memory."""
        reservation = Reservation()
        try:
            yield reservation
        finally:
            self._used -= reservation.size

    def grow(self, reservation: Reservation, size: int) -> None:
        """Count an arriving body with `size` bytes, and end the arrival of others, or its own, for lack of memory."""
        if size <= SMALL_BODY:
            return
        self._used += size - reservation.size
        reservation.size = size
        self._arriving[reservation] = None
        while self._used > self._max_bytes and self._arriving:
            self._withdraw(next(iter(self._arriving)))

    def _withdraw(self, reservation: Reservation) -> None:
        del self._arriving[reservation]
        self._used -= reservation.size
        reservation.size, reservation.is_withdrawn = 0, True
        assert reservation.timeout is not None  # it is arriving
        if not reservation.timeout.expired():
            reservation.timeout.reschedule(0)  # in the past

    def end_arrival(self, reservation: Reservation) -> None:
        """Keep the memory of a body that arrives no longer, for as long as its reservation lasts."""
        self._arriving.pop(reservation, None)
