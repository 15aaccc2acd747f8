"""Clients of a running server that stream completions, many at a time, and record when each token arrived."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from opt_megatron.errors import UserError

_DATA, _DONE = b"data: ", b"[DONE]"


@dataclass(frozen=True)
class LoadRequest:
    """One request; all other fields are the same for all requests."""

    prompt: str
    seed: int


@dataclass
class LoadResult:
    """The outcome of a request.

    Attributes:
        status: of HTTP; 0 if the connection failed.
        times: of each event of the stream with text, in seconds since the request.
        error: the message, if something went wrong.
    """

    request: LoadRequest
    status: int = 0
    text: str = ""
    times: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one event and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class LoadClient:
    """Sends requests to /v1/completions of a server.

    Args:
        url: of the server, as http://127.0.0.1:5000.
        options: fields of every request.
        api_key: sent with each, if there is one.
    """

    def __init__(self, url: str, options: dict[str, object], api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UserError(f"{url!r} is not the address of a server, as http://127.0.0.1:5000 is")
        self._host, self._port = parts.hostname, parts.port or 80
        self._options = options
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def stream(self, request: LoadRequest) -> LoadResult:
        """Send one request and read its stream to the last event."""
        result, begun = LoadResult(request), time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            result.error = str(error)
            return result
        try:
            writer.write(self._encode(request))
            await self._read(reader, result, begun)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            result.error = f"{type(error).__name__}: {error}"
        finally:
            writer.close()
        return result

    def _encode(self, request: LoadRequest) -> bytes:
        body = {"prompt": request.prompt, "seed": request.seed, "stream": True, **self._options}
        content = json.dumps(body).encode()
        # HTTP/1.0: the response ends with the connection and is not sent in chunks, which would need decoding.
        head = f"POST /v1/completions HTTP/1.0\r\nHost: {self._host}\r\nContent-Type: application/json\r\n{self._key}"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def _read(self, reader: asyncio.StreamReader, result: LoadResult, begun: float) -> None:
        result.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if result.status != 200:
            result.error = json.loads(await reader.read())["error"]["message"]
            return
        is_done = False
        while line := await reader.readline():
            if not line.startswith(_DATA):
                continue
            now, content = time.perf_counter() - begun, line[len(_DATA) :].strip()
            if content == _DONE:
                is_done = True
                continue
            self._add_event(json.loads(content), result, now)
        if not is_done:
            result.error = result.error or "the stream ended without [DONE]"

    @staticmethod
    def _add_event(event: dict, result: LoadResult, now: float) -> None:
        if "error" in event:
            result.error = event["error"]["message"]
            return
        result.text += event["choices"][0]["text"]
        result.times.append(now)


async def keep_streams(
    client: LoadClient, requests: list[LoadRequest], streams: int, seconds: float, on_done: asyncio.Queue[int]
) -> list[LoadResult]:
    """Keep `streams` streams open for `seconds` seconds, starting the next request whenever one ends.

    Streams that are open then are read to their end. `on_done` receives the number of ended requests at each end.
    """
    waiting = iter(requests)
    results: list[LoadResult] = []
    end = time.perf_counter() + seconds

    async def one_after_another() -> None:
        while time.perf_counter() < end and (request := next(waiting, None)) is not None:
            results.append(await client.stream(request))
            on_done.put_nowait(len(results))

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return results
