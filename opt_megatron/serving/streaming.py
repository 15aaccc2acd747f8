"""Sends the completions of one HTTP request: as one JSON body, or as server-sent events.

Either way the engine stops working on the request as soon as the client closes the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .choices import Choice
from .errors import ApiError
from .protocol import StreamOptions
from .request_output import OutputCollector
from .response import ResponseBuilder

_DONE = b"data: [DONE]\n\n"


@contextmanager
def _cancel_at_exit_or_disconnect(receive: Receive, output: OutputCollector) -> Iterator[None]:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        output.cancel()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        output.cancel()


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ApiError(
            504, f"the request was not done within {seconds:g} s: ask for less, or try again later", code="timeout"
        ) from None


async def collect_response(
    output: OutputCollector, builder: ResponseBuilder, receive: Receive, seconds: float
) -> dict[str, Any]:
    """Wait for all events of a request.

    Args:
        receive: of ASGI; a disconnect that it reports cancels the request.
        seconds: time limit.

    Returns:
        The body of the response.

    Raises:
        ApiError: the engine could not finish the request, or not in time (504).
    """
    deltas: list[Choice] = []
    with _cancel_at_exit_or_disconnect(receive, output):
        async with _time_limit(seconds):
            while events := await output.next_events():
                deltas += builder.add_events(events)
    return builder.to_response(deltas)


class EventStreamResponse(Response):
    """A response as server-sent events: one chunk for every token, then `[DONE]`.

    Args:
        seconds: time limit.
        options: with `include_usage`, a chunk with the number of tokens is appended, and all others have `"usage"` too.
    """

    media_type = "text/event-stream"

    def __init__(
        self, output: OutputCollector, builder: ResponseBuilder, seconds: float, options: StreamOptions
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._output, self._builder, self._seconds = output, builder, seconds
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with _cancel_at_exit_or_disconnect(receive, self._output):
            try:
                async with _time_limit(self._seconds):
                    while events := await self._output.next_events():
                        deltas = self._builder.add_events(events)
                        await send(_body(b"".join(self._chunk(delta) for delta in deltas if _has_content(delta))))
            except ApiError as error:  # the status line is sent already, so the error becomes an event
                await send(_body(_event(error.to_json())))
            else:
                await send(_body(self._usage_chunk()))
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    def _chunk(self, delta: Choice) -> bytes:
        chunk = self._builder.to_chunk([delta])
        if self._options.include_usage:
            chunk["usage"] = self._builder.usage if self._options.continuous_usage_stats else None
        return _event(chunk)

    def _usage_chunk(self) -> bytes:
        if not self._options.include_usage:
            return b""
        return _event({**self._builder.to_chunk([]), "usage": self._builder.usage})


def _has_content(delta: Choice) -> bool:
    # A token that completes no character adds no text, and often nothing else.
    return any(value for name, value in delta.items() if name != "index")


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}
