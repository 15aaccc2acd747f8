"""Answers of a job: whole, or as server-sent events; a client that goes away ends the job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answer import Answer, Choice
from .errors import ApiError
from .job import Job

_DONE = b"data: [DONE]\n\n"


@contextmanager
def _ended_with(receive: Receive, job: Job) -> Iterator[None]:
    """Cancels the job when the client goes away, and however the block ends."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        job.cancel()


@asynccontextmanager
async def _bounded(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ApiError(
            504, f"the request was not done within {seconds:g} s: ask for less, or try again later", code="timeout"
        ) from None


async def whole_answer(job: Job, answer: Answer, receive: Receive, seconds: float) -> dict[str, Any]:
    """The body of an answer, when all of it is there.

    Raises:
        ApiError: the job could not be done, or not within so many seconds.
    """
    pieces: list[Choice] = []
    with _ended_with(receive, job):
        async with _bounded(seconds):
            while arrivals := await job.events():
                pieces += answer.take(arrivals)
    return answer.whole(pieces)


class EventStream(Response):
    """An answer as server-sent events: a chunk for every token, and `[DONE]`.

    Args:
        include_usage: a last chunk with the number of tokens, and `"usage": null` in the others.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, answer: Answer, seconds: float, *, include_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._answer, self._seconds = job, answer, seconds
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with _ended_with(receive, self._job):
            try:
                async with _bounded(self._seconds):
                    while arrivals := await self._job.events():
                        pieces = self._answer.take(arrivals)
                        await send(_part(b"".join(self._chunk([piece]) for piece in pieces if _says(piece))))
            except ApiError as error:  # the status is sent already: the error is an event
                await send(_part(_event(error.to_json())))
            else:
                await send(_part(self._usage()))
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    def _chunk(self, choices: list[Choice]) -> bytes:
        chunk = self._answer.chunk(choices)
        return _event({**chunk, "usage": None} if self._include_usage else chunk)

    def _usage(self) -> bytes:
        return _event({**self._answer.chunk([]), "usage": self._answer.usage}) if self._include_usage else b""


def _says(piece: Choice) -> bool:
    """Half a character alone says nothing yet."""
    return bool(piece["text"] or piece["finish_reason"] or piece["logprobs"])


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}
