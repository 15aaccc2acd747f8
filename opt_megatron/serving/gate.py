"""What every request passes first: the key, and a body that arrives in time and is not too large."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Limits

OPEN_PATHS = ("/health", "/", "/page/app.js", "/page/style.css")
_JSON = (b"application/json", b"text/json")
_MOST_DISCARDED = 8  # times the largest body: read and thrown away, so that the client comes to read the answer


class Gate:
    """ASGI middleware; routes behind it get the body in one piece.

    Args:
        api_key: what requests must carry as `Authorization: Bearer KEY`; None asks for nothing.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        self._app, self._limits = app, limits
        self._wanted = None if api_key is None else api_key.encode("utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            body = await self._body(scope["method"], headers, receive)
        except ApiError as error:
            await error.to_response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._wanted is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._wanted):
            raise ApiError(
                401,
                "the request needs this server's key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, method: str, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body, or None of a client that has gone.

        Raises:
            ApiError: it is too large (413), too slow (408), or no JSON by its own word (415).
        """
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(receive, self._limits.body_bytes)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._limits.body_seconds:g} s",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        # A page of another site can send forms and plain text to this server, but not JSON.
        if body and method == "POST" and kind not in _JSON:
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        return body


async def _read(receive: Receive, most: int) -> bytes | None:
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        size += len(piece)
        if size <= most:
            body += piece
        is_last = not message.get("more_body", False)
        if size > most and (is_last or size > _MOST_DISCARDED * most):
            raise ApiError(
                413,
                f"the body has more than {most} bytes, which is the most that this server takes",
                code="body_too_large",
                headers={"Connection": "close"},
            )
        if is_last:
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then whatever else comes."""
    is_given = False

    async def next_message() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
