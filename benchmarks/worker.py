"""Child processes: each has one system with one model, and runs the methods that the parent calls.

with Worker("transformers", setup) as worker: ...
model = in_child("a model", threads, make, arguments)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from opt_megatron.errors import UserError

from .system_protocol import Setup

_PATIENCE = 30  # seconds to wait for a child to end


class Worker:
    """A system in a child process, or in `setup.ranks` of them.

    Args:
        kinds: module and name of the dictionary from system names to classes.
        deadline: of `time.monotonic`, after which every call raises TimeoutError; None: wait for ever.
    """

    def __init__(
        self, system: str, setup: Setup, kinds: str = "systems:SYSTEMS", deadline: float | None = None
    ) -> None:
        self._name = f"{system} ({setup.dtype})"
        self._deadline = deadline
        self._directory = tempfile.TemporaryDirectory(prefix="benchmark-ranks-")
        store = Path(self._directory.name) / "store"
        self._children = [
            _Child(self._name, _serve_system, system, replace(setup, rank=rank, store=store), kinds)
            for rank in range(setup.ranks)
        ]
        try:
            self._answers()  # loaded
        except BaseException:
            self._close(0)
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Call the system's method, on every rank at once, and return the first rank's result."""
        for child in self._children:
            child.send((method, args))
        return self._answers()[0]

    def _answers(self) -> list[Any]:
        return [child.answer(self._deadline) for child in self._children]

    def _close(self, patience: float) -> None:
        for child in self._children:
            child.close(patience)
        self._directory.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._close(_PATIENCE if kind is None else 0)


def in_child(what: str, threads: int, function: Callable[..., Any], *args: Any, deadline: float | None = None) -> Any:
    """`function(*args)` in a fresh process with this many threads, which ends with it.

    Args:
        deadline: of `time.monotonic`, at which the process is killed, and TimeoutError raised.
    """
    child = _Child(what, _call_once, threads, function, args)
    patience = 0
    try:
        value, patience = child.answer(deadline), _PATIENCE
        return value
    finally:
        child.close(patience)


def iterate_in_child(
    what: str, threads: int, deadline: float, function: Callable[..., Iterator[Any]], *args: Any
) -> Iterator[Any]:
    """What `function(*args)` yields in a fresh process, each value as soon as it is there.

    Args:
        deadline: of `time.monotonic`, at which the process is killed.

    Raises:
        UserError, RuntimeError: as in `in_child`, after the values that came before.
        TimeoutError: the deadline has come.
    """
    child = _Child(what, _yield_each, threads, function, args)
    patience = 0
    try:
        while value := child.answer(deadline):
            yield value[0]
        patience = _PATIENCE
    finally:
        child.close(patience)


class _Child:
    """A process with a pipe to it."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the parent's memory and threads
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()  # while it is open here, a child that has ended looks like one that is busy

    def send(self, message: Any) -> None:
        self._pipe.send(message)

    def answer(self, deadline: float | None = None) -> Any:
        """What the child returns.

        Args:
            deadline: of `time.monotonic`; None: wait for ever.

        Raises:
            UserError: it ended, or reports a mistake of the user's.
            RuntimeError: it failed; with its traceback.
            TimeoutError: the deadline has come.
        """
        if deadline is not None and not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"the process of {self._name} has taken too long")
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            memory = ": most likely memory ran out" if code == -9 else ""
            raise UserError(f"the process of {self._name} ended with code {code}{memory}") from None
        if kind == "mistake":
            raise UserError(f"{self._name}: {value}")
        if kind == "failure":
            raise RuntimeError(f"{self._name}:\n{value}")
        return value

    def close(self, patience: float) -> None:
        """Wait this many seconds for the process to end, then kill it (after an error it may still be computing)."""
        self._pipe.close()
        self._process.join(patience)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _serve_system(pipe: Connection, system: str, setup: Setup, kinds: str) -> None:
    _set_environment(setup.threads)
    if setup.ranks > 1:
        os.environ |= {"RANK": str(setup.rank), "LOCAL_RANK": str(setup.rank), "WORLD_SIZE": str(setup.ranks)}
    module, name = kinds.split(":")
    kind = getattr(importlib.import_module(f"{__package__}.{module}"), name)[system]

    def load() -> Any:
        kind.prepare(setup)
        return kind(setup)

    loaded = _answer(pipe, load, keep=True)
    while loaded is not None:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        _answer(pipe, getattr(loaded, method), *args)


def _call_once(pipe: Connection, threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _set_environment(threads)
    _answer(pipe, function, *args)


def _yield_each(pipe: Connection, threads: int, function: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> None:
    """Send each value in a tuple, and None after the last one."""
    _set_environment(threads)

    def tuples() -> Iterator[tuple[Any]]:
        for value in function(*args):
            yield (value,)

    values = tuples()
    while _answer(pipe, next, values, None) is not None:
        pass


def _answer(pipe: Connection, function: Callable[..., Any], *args: Any, keep: bool = False) -> Any:
    """Send the function's result, or how it failed; with `keep`, send None instead and return the result."""
    try:
        value = function(*args)
    except UserError as error:
        pipe.send(("mistake", str(error)))
    except Exception:
        pipe.send(("failure", traceback.format_exc()))
    else:
        pipe.send(("value", None if keep else value))
        return value


def _set_environment(threads: int) -> None:
    """Set the same number of threads for every library, before any is imported: they read it only then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
