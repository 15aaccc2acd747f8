"""The directory of one run (`--save`): locked while the run writes it, and refused where it holds something else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from types import TracebackType

from ..errors import UserError
from .progress import METRICS_FILE

_LOCK = ".lock"
_CHECKPOINT = re.compile(r"iter_\d{7,}")
_MARKS = ("manifest.json", "metadata.json", "common.pt", ".metadata")  # of a torch_dist checkpoint, even a damaged one


class RunDirectory:
    """Use as a context manager, on the leader; it is made, checked and locked on entering.

    Raises (on entering):
        UserError: it cannot be written, another run is writing it, or it holds what no run here has written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> RunDirectory:
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_contents()
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"--save {self.path}: cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise UserError(f"--save {self.path}: another run is writing it just now") from None
        return self

    def _check_contents(self) -> None:
        for child in self.path.iterdir():
            if _CHECKPOINT.fullmatch(child.name) and not any((child / mark).exists() for mark in _MARKS):
                raise UserError(
                    f"--save {self.path}: holds {child.name}, which no training here has written: use another one"
                )
        metrics = self.path / METRICS_FILE
        if metrics.exists() and not _is_ours(metrics):
            raise UserError(f"--save {self.path}: holds a {METRICS_FILE} of something else: use another directory")

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._made and [child.name for child in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()  # nothing came of this run: leave nothing of it
            for directory in self._made:
                with contextlib.suppress(OSError):
                    directory.rmdir()
        self._close()


def _is_ours(metrics: Path) -> bool:
    with metrics.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(100_000)
    try:
        return not line or {"kind", "iteration"} <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        return False
