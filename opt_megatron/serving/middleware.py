"""ASGI middleware: counts requests; the API key, then the size and the time of a body, and the memory of all bodies."""

from __future__ import annotations

import asyncio
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body_memory import BodyMemory, Reservation
from .errors import ApiError
from .limits import Limits
from .metrics import Metrics

# Open without a key: for load balancers, and for the page, which asks its user for the key.
PUBLIC_PATHS = ("/health", "/ping", "/", "/page/app.js", "/page/style.css")
# Requests of these routes are not counted: load balancers and monitoring send them all the time.
_UNCOUNTED_PATHS = ("/metrics", "/health", "/load", "/ping", "/version")
_JSON_TYPE = b"application/json"
# A body that is too large is read and discarded up to this multiple of the limit, because many clients read the
# response only once they have sent the whole body.
_MAX_DISCARDED = 8
# The memory of all bodies together, as a multiple of the limit of one.
_MAX_BODIES = 16


class HttpMetricsMiddleware:
    """Counts requests by their routes and the classes of their status codes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (ASGI)."""
        if scope["type"] != "http" or scope["path"] in _UNCOUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            # Not the path: a client could make any number of them.
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.count_http_request(handler, status, time.perf_counter() - start)


class AuthenticationMiddleware:
    """Answers 401 to requests without the key.

    Args:
        api_key: expected as `Authorization: Bearer KEY`; None takes every request.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it (ASGI)."""
        if scope["type"] == "http" and not self._is_allowed(scope):
            error = ApiError(
                401,
                "the request needs this server's key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.to_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._api_key is None or scope["path"] in PUBLIC_PATHS:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._api_key)


class BodyLimitMiddleware:
    """Reads the body of a request before any route sees it; answers 413, 408, 415 or 503 itself."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._memory = BodyMemory(_MAX_BODIES * limits.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body in one message, or answer it (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._memory.reserve() as reservation:
            try:
                body = await self._read_body(scope, receive, reservation)
            except ApiError as error:
                await error.to_response()(scope, receive, send)
                return
            if body is not None:
                await self._app(scope, _with_body(body, receive), send)

    async def _read_body(self, scope: Scope, receive: Receive, reservation: Reservation) -> bytes | None:
        """The body; None if the client has closed the connection.

        Raises:
            ApiError: the body is too large (413), too slow (408), not declared as JSON (415), or has no room beside
                others (503).
        """
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds) as reservation.timeout:
                body = await self._receive_body(receive, reservation)
        except TimeoutError:
            close = {"Connection": "close"}
            if reservation.is_withdrawn:
                raise ApiError(
                    503,
                    "the bodies of other requests take all the memory for bodies: send the request again",
                    code="overloaded",
                    headers={"Retry-After": "1", **close},
                ) from None
            raise ApiError(
                408, f"the body did not arrive within {seconds:g} s", code="timeout", headers=close
            ) from None
        finally:
            self._memory.end_arrival(reservation)
        content_type = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A browser lets a page of any other site post forms and plain text here without asking, but not JSON.
        if body and scope["method"] == "POST" and content_type != _JSON_TYPE:
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        return body

    async def _receive_body(self, receive: Receive, reservation: Reservation) -> bytes | None:
        max_bytes = self._limits.body_bytes
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            size += len(piece)
            if size <= max_bytes:
                body += piece
                self._memory.grow(reservation, size)
            is_last = not message.get("more_body", False)
            if size > max_bytes and (is_last or size > _MAX_DISCARDED * max_bytes):
                raise ApiError(
                    413,
                    f"the body has more than {max_bytes} bytes, which is the most that this server takes",
                    code="body_too_large",
                    headers={"Connection": "close"},
                )
            if is_last:
                return bytes(body)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """An ASGI `receive` that returns the body first, and then what `receive` returns."""
    is_sent = False

    async def next_message() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
