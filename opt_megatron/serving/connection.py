"""Connections that cannot be held for nothing: every wait for the client has an end.

uvicorn ends a connection that is silent between two requests. Not bounded there: how long the head of a request
may take, how long a body may go on after its request was answered, and how long a client may not read.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with bounds."""

    head_seconds = 10.0  # for a request's head, and for what remains of an answered request's body
    write_seconds = 60.0  # for a client that has stopped reading

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has come, and must ask for something."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        """A request is answered."""
        super().on_response_complete()
        self._expect()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._write_timer = _cancel(self._write_timer)

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(error)
        self._head_timer, self._write_timer = _cancel(self._head_timer), _cancel(self._write_timer)

    def _expect(self) -> None:
        """Run the timer while something is owed, from when it began to be; more bytes do not wind it up again."""
        if not self._is_owed():
            self._head_timer = _cancel(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _is_owed(self) -> bool:
        """A request's head has begun (or there was none yet), or the body of one that is answered goes on."""
        if self.conn.their_state is h11.IDLE:
            return self.cycle is None or bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    """Stop a timer; gives what stands in its place."""
    if timer is not None:
        timer.cancel()
