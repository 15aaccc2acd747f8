"""Runs the application: uvicorn in this thread, the engine in another, and an orderly end of both."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import UserError
from .connection import BoundedConnection
from .service import Service, State

_SECONDS_FOR_ANSWERS = 5  # to be written when everything has ended
_SAME_SIGNAL = 1.0  # torchrun passes on a signal that the terminal has sent already


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: there is none to be had.
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
    """Where a browser finds it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which on a signal lets the service finish first.

    Args:
        max_connections: at a time; more are answered with 503.
    """

    def __init__(self, service: Service, app: FastAPI, max_connections: int = 2048) -> None:
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
                timeout_graceful_shutdown=_SECONDS_FOR_ANSWERS,
            )
        )
        self._service = service
        self._signalled: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or the engine's end.

        Raises:
            UserError, RuntimeError, ...: what ended the engine, if not a signal.
            KeyboardInterrupt: a signal came while the model was being loaded, or two came.
        """
        super().run(sockets)
        if self._service.error is not None:
            raise self._service.error
        if self._service.state is not State.ENDED:
            raise KeyboardInterrupt

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen and to load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._service.start()
        self._ending = self._loop.create_task(self._exit_with_engine())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the service in an orderly way, another one at once."""
        now = time.monotonic()
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        elif self._signalled is None:
            self._signalled = now
            self._loop.call_soon_threadsafe(self._drain)
        elif now - self._signalled > _SAME_SIGNAL:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        if self._service.state is State.LOADING:
            self.should_exit = True
        else:
            self._draining = self._loop.create_task(self._service.drain())

    async def _exit_with_engine(self) -> None:
        await self._service.ended()
        self.should_exit = True


def ignore_signals() -> None:
    """For ranks that do not lead: torchrun tells all ranks to end, and they end when the leader lets them go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
