"""Clients of a running server that stream completions, many at a time, and note when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from opt_megatron.errors import UserError

_DATA, _DONE = b"data: ", b"[DONE]"


@dataclass(frozen=True)
class Asked:
    """A request: everything else is the same for all."""

    prompt: str
    seed: int


@dataclass
class Got:
    """What came of it.

    Attributes:
        status: of HTTP; 0 where the connection broke.
        times: of each event of the stream that brought text, in seconds since the request.
        error: the message, where something went wrong.
    """

    asked: Asked
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

    async def stream(self, asked: Asked) -> Got:
        """One request, from its connection to the last event."""
        got, begun = Got(asked), time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            got.error = str(error)
            return got
        try:
            writer.write(self._request(asked))
            await self._read(reader, got, begun)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            got.error = f"{type(error).__name__}: {error}"
        finally:
            writer.close()
        return got

    def _request(self, asked: Asked) -> bytes:
        body = {"prompt": asked.prompt, "seed": asked.seed, "stream": True, **self._options}
        content = json.dumps(body).encode()
        # HTTP/1.0: the answer ends with the connection, and needs no decoding of chunks.
        head = f"POST /v1/completions HTTP/1.0\r\nHost: {self._host}\r\nContent-Type: application/json\r\n{self._key}"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def _read(self, reader: asyncio.StreamReader, got: Got, begun: float) -> None:
        got.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if got.status != 200:
            got.error = json.loads(await reader.read())["error"]["message"]
            return
        is_done = False
        while line := await reader.readline():
            if not line.startswith(_DATA):
                continue
            now, content = time.perf_counter() - begun, line[len(_DATA) :].strip()
            if content == _DONE:
                is_done = True
                continue
            self._take(json.loads(content), got, now)
        if not is_done:
            got.error = got.error or "the stream ended without [DONE]"

    @staticmethod
    def _take(event: dict, got: Got, now: float) -> None:
        if "error" in event:
            got.error = event["error"]["message"]
            return
        got.text += event["choices"][0]["text"]
        got.times.append(now)


async def keep_streams(
    client: LoadClient, asked: list[Asked], streams: int, seconds: float, on_done: asyncio.Queue[int]
) -> list[Got]:
    """Keep so many streams open, each with the next request as its last one ends, until the time is over.

    Streams that are open then are read to their end. `on_done` is told how many have ended, at each end.
    """
    waiting, results = iter(asked), []
    end = time.perf_counter() + seconds

    async def one_after_another() -> None:
        while time.perf_counter() < end and (request := next(waiting, None)) is not None:
            results.append(await client.stream(request))
            on_done.put_nowait(len(results))

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return results
