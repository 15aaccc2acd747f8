"""`Server`: uvicorn in this thread, the engine in another, and the shutdown of both."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UserError
from .async_engine import AsyncEngine, EngineState
from .connection import BoundedConnection

_ANSWER_SECONDS = 5  # to send the last responses after the engine has stopped
# torchrun forwards to its processes a signal that the terminal has already sent to them, so a second signal within
# this time is the same one.
_SAME_SIGNAL_SECONDS = 1.0


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of the socket's address, for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which lets the engine finish its requests when a signal comes.

    Args:
        max_connections: at a time; uvicorn answers 503 on further ones.
    """

    def __init__(self, async_engine: AsyncEngine, app: FastAPI, max_connections: int = 2048) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedConnection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=max_connections,
                timeout_graceful_shutdown=_ANSWER_SECONDS,
            )
        )
        self._async_engine = async_engine
        self._first_signal: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes or the engine stops.

        Raises:
            BaseException: the error that stopped the engine, if one did.
            KeyboardInterrupt: a signal came while the model was being loaded, or two signals came.
        """
        super().run(sockets)
        if self._async_engine.error is not None:
            raise self._async_engine.error
        if self._async_engine.state is not EngineState.STOPPED:
            raise KeyboardInterrupt

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load the model."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._async_engine.start()
        self._exit_task = self._loop.create_task(self._exit_when_stopped())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let the engine finish its requests on the first signal; exit at once on the second."""
        now = time.monotonic()
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        elif self._first_signal is None:
            self._first_signal = now
            self._loop.call_soon_threadsafe(self._drain, self._loop)
        elif now - self._first_signal > _SAME_SIGNAL_SECONDS:
            self.should_exit = self.force_exit = True

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._async_engine.state is EngineState.LOADING:
            self.should_exit = True
        else:
            self._drain_task = loop.create_task(self._async_engine.drain())

    async def _exit_when_stopped(self) -> None:
        await self._async_engine.wait_until_stopped()
        self.should_exit = True


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM, on ranks other than the leader.

    torchrun signals all ranks, but the leader needs the others until its requests have finished; it stops them then.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
