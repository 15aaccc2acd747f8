"""What the program did to the device: launches, copies, waits; and what was refused."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

UPLOAD = "upload"  # the host waits: from pageable memory
ASYNCHRONOUS_UPLOAD = "asynchronous upload"  # from pinned memory, non_blocking
READ = "read"  # the host waits for a value
ASYNCHRONOUS_READ = "asynchronous read"  # to pinned memory, non_blocking
WAIT = "wait"  # the host waits without a copy: synchronize(), or a shape that depends on values
_BLOCKING = (UPLOAD, READ, WAIT)


class DeviceMismatch(RuntimeError):
    """Tensors, or a tensor and a generator, on two devices."""


class CaptureError(RuntimeError):
    """Not allowed while a CUDA graph is captured."""


@dataclass
class Counts:
    """What happened inside a `counting` block; it may be read before its end, too.

    Attributes:
        kernels: launches by operation.
        transfers: by kind, the constants of this module.
        lines: transfers by (kind and cause, "file:line") of the program under test.
        host_operations: operations on CPU tensors alone. A graph's replay would not repeat them.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    transfers: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    host_operations: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """Kernels in all."""
        return self.kernels.total()

    @property
    def blocking_reads(self) -> int:
        """How often the host waited for the device."""
        return self.transfers[READ] + self.transfers[WAIT]

    @property
    def uploads(self) -> int:
        """How often the host waited until memory of its own had been copied to the device."""
        return self.transfers[UPLOAD]


violations: list[str] = []  # every mismatch and refused capture
sources = ("opt_megatron", "megatron/core")  # folders of the program under test, whose lines are named

_FOLDER = str(Path(__file__).parent)
_active_counts: list[Counts] = []
_num_captures = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside the block, on all threads. Blocks may be nested."""
    counts = Counts()
    _active_counts.append(counts)
    try:
        yield counts
    finally:
        _active_counts[:] = [other for other in _active_counts if other is not counts]


@contextlib.contextmanager
def capturing() -> Iterator[Counts]:
    """Refuse, in the block, all that would end the capture of a CUDA graph, and count what happens.

    These are blocking reads (`item`, `tolist`, `cpu`, `bool` of a tensor), shapes that depend on values, uploads from
    pageable memory (`torch.tensor(..., device="cuda")`, `to("cuda")`) and synchronisation.
    """
    global _num_captures
    _num_captures += 1
    try:
        with counting() as counts:
            yield counts
    finally:
        _num_captures -= 1


def line() -> str:
    """The innermost line of the program under test."""
    frame, nearest = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        for source in sources:
            if f"/{source}/" in name:
                return f"{name[name.rindex(f'/{source}/') + 1 :]}:{frame.f_lineno}"
        if nearest is None and not name.startswith(_FOLDER) and "/torch/" not in name and not name.startswith("<"):
            nearest = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return nearest or "autograd"


def launch(name: str) -> None:
    """Count a kernel."""
    for counts in _active_counts:
        counts.kernels[name] += 1


def host_operation(name: str) -> None:
    """Count an operation on CPU tensors alone."""
    for counts in _active_counts:
        counts.host_operations[name] += 1


def is_capturing() -> bool:
    """A CUDA graph is being captured."""
    return _num_captures > 0


def transfer(kind: str, cause: str) -> None:
    """Count a copy or a wait, and refuse one for which a capture cannot wait."""
    if _num_captures and kind in _BLOCKING:
        refuse(CaptureError, f"{kind} ({cause}) while a CUDA graph is captured")
    if not _active_counts:
        return
    place = line()
    for counts in _active_counts:
        counts.transfers[kind] += 1
        counts.lines[f"{kind} ({cause})", place] += 1


def take_violations() -> list[str]:
    """What was refused since the last call, also where the program caught the exception."""
    found = violations.copy()
    violations.clear()
    return found


def refuse(error: type[RuntimeError], text: str) -> NoReturn:
    """Raise the error, with the program's line, and keep it among the violations."""
    violations.append(f"{text}, at {line()}")
    raise error(violations[-1])
