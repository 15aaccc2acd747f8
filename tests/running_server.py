"""Servers on free ports, with the embedded model, and a client of the standard library's."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.generation.core.engine import Engine
from opt_megatron.serving.app import make_app
from opt_megatron.serving.async_engine import AsyncEngine
from opt_megatron.serving.limits import Limits
from opt_megatron.serving.metrics import Metrics
from opt_megatron.serving.served_model import ServedModel
from opt_megatron.serving.server import Server, bind
from opt_megatron.tokenizer import OPTTokenizer

SECONDS = 60  # after which a test has failed
TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
LONG = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "temperature": 0}  # outlasts a test


class Brake:
    """Replaces a runner: its steps wait while the brake is on, or fail."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.steps = 0
        self._free = threading.Event()
        self._free.set()
        self.error: BaseException | None = None

    def on(self) -> None:
        self._free.clear()

    def off(self) -> None:
        self._free.set()

    def forward(self, step: Any) -> Any:
        assert self._free.wait(SECONDS)
        self.steps += 1
        if self.error is not None:
            raise self.error
        return self._runner.forward(step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


@dataclass
class Answer:
    """The response to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The stream's, without the last, which must be [DONE]."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@dataclass
class Running:
    """A server that runs in a thread."""

    port: int
    async_engine: AsyncEngine
    brake: Brake
    server: Server
    thread: threading.Thread

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send a request; a body of bytes is sent unchanged, and anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if content is not None else {}
            connection.request(method, path, content, kind | (headers or {}))
            got = connection.getresponse()
            return Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        finally:
            connection.close()

    def complete(self, **body: Any) -> Answer:
        """POST /v1/completions."""
        return self.request("POST", "/v1/completions", body)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value."""
        text = self.request("GET", "/metrics").body.decode()
        labels |= {"engine": "0", "model_name": "story"} if name.startswith("vllm:") else {}
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            label = ",".join(sorted(head.partition("{")[2].rstrip("}").split(",")))
            if head.partition("{")[0] == name and label == ",".join(sorted(wanted.split(","))):
                return float(value)
        raise AssertionError(f"there is no {name} with {wanted}")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        pause = threading.Event()
        for _ in range(SECONDS * 100):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it did not come to hold")


@contextmanager
def running(
    alone: Any,
    limits: Limits | None = None,
    api_key: str | None = None,
    before_ready: Callable[[], None] = lambda: None,
    **engine_options: Any,
) -> Iterator[Running]:
    """A server; its `brake` holds the engine's steps."""
    engine = Engine(load_model(EMBEDDED_DIRECTORY, None, alone), alone, **engine_options)
    brake = Brake(engine._runners[0])
    engine._runners[0] = brake
    served = ServedModel(engine, TOKENIZER, OPTConfig.from_file(EMBEDDED_DIRECTORY / "config.json"), ("story",))

    def load() -> ServedModel:
        before_ready()
        return served

    async_engine = AsyncEngine(load, limits or Limits(), Metrics("story"))
    server = Server(async_engine, make_app(async_engine, api_key))
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]

    def serve() -> None:
        try:
            server.run([listener])
        except BaseException as error:
            server.raised = error

    server.raised = None
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    made = Running(port, async_engine, brake, server, thread)
    made.wait_for(lambda: server.started)
    try:
        yield made
    finally:
        brake.off()
        server.handle_exit(15, None)
        thread.join(SECONDS)
        assert not thread.is_alive()


def in_thread(action: Callable[[], Any]) -> Callable[[], Any]:
    """What it returns, or the error that it raised, once it is asked for."""
    results: list[Any] = []

    def act() -> None:
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(SECONDS)
        return results[0]

    return result


def aborted(server: Running) -> float:
    """How many requests have ended because their client went away or waited too long."""
    return server.metric("vllm:request_success_total", finished_reason="abort")
