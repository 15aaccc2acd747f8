"""`BoundedConnection`: a connection that limits every wait for the client.

uvicorn closes a connection that is idle between two requests. It does not limit how long the head of a request may
take, how long a body may go on after its request was answered, or how long a client may leave a response unread.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with those limits.

    Attributes:
        head_seconds: for the head of a request, and for the rest of the body of an answered request.
        write_seconds: for a client that has stopped reading.
    """

    head_seconds = 10.0
    write_seconds = 60.0

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._update_head_timer()

    def on_response_complete(self) -> None:
        """Continue with the next request of the connection."""
        super().on_response_complete()
        self._update_head_timer()

    def pause_writing(self) -> None:
        """Start the timer of a client that does not read the response."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of `pause_writing`."""
        super().resume_writing()
        _cancel(self._write_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        _cancel(self._head_timer)
        _cancel(self._write_timer)

    def _update_head_timer(self) -> None:
        """Run the timer while the client owes data. More bytes do not restart it."""
        if not self._owes_data():
            _cancel(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _owes_data(self) -> bool:
        """Whether the head of a request, the first or one that has begun, or the body of an answered one is missing."""
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
