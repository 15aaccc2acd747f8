"""The directory of one run (`--save`): locked while the run writes it, and refused where it holds something else."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import TracebackType

from ..errors import UserError
from ..files import cannot_write, created_directory, file_lock
from .progress import METRICS_FILE
from .run_file import check_run_file

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
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunDirectory:
        is_new = not self.path.exists()
        busy = f"--save {self.path}: another run is writing it just now"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(created_directory(self.path))
                self._check_contents()
                stack.enter_context(file_lock(self.path / _LOCK, busy))
            except OSError as error:
                raise UserError(f"--save {cannot_write(self.path, error)}") from None
            if is_new:
                stack.push(self._remove_if_nothing_was_written)
            self._stack = stack.pop_all()
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
        check_run_file(self.path)

    def _remove_if_nothing_was_written(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and [child.name for child in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()  # the directory is then empty and removed, too

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _is_ours(metrics: Path) -> bool:
    with metrics.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(100_000)
    try:
        return not line or {"kind", "iteration"} <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        return False
