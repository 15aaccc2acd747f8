"""The directory of one run (`--save`): locked while the run writes it, and refused if it holds anything else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from ..data.jsonl import parse_object
from ..errors import UserError
from ..files import cannot_write, created_directory, file_lock, open_input
from .checkpointing.integrity import MANIFEST_FILE, saved_checkpoints
from .metrics import METRICS_FILE
from .run_file import check_run_file

_LOCK_FILE = ".lock"
_CHECKPOINT_FILES = (
    MANIFEST_FILE,
    "config.json",
)  # Megatron-LM writes neither; one is left even in a damaged checkpoint


class RunDirectory:
    """Use as a context manager, on the leader. On entering, the directory is created, checked and locked.

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
                stack.enter_context(file_lock(self.path / _LOCK_FILE, busy))
            except OSError as error:
                raise UserError(f"--save {cannot_write(self.path, error)}") from None
            if is_new:
                stack.push(self._remove_if_nothing_was_written)
            self._stack = stack.pop_all()
        return self

    def _check_contents(self) -> None:
        for _, checkpoint in saved_checkpoints(self.path):
            if not any((checkpoint / name).exists() for name in _CHECKPOINT_FILES):
                raise UserError(
                    f"--save {self.path}: holds {checkpoint.name}, which no training here has written: use another "
                    "directory, and --load for its weights"
                )
        metrics = self.path / METRICS_FILE
        if metrics.exists() and not _is_metrics_file(metrics):
            raise UserError(f"--save {self.path}: holds a {METRICS_FILE} of something else: use another directory")
        check_run_file(self.path)

    def _remove_if_nothing_was_written(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and [child.name for child in self.path.iterdir()] == [_LOCK_FILE]:
            (self.path / _LOCK_FILE).unlink()  # the directory is then empty, and `created_directory` removes it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _is_metrics_file(path: Path) -> bool:
    with open_input(path) as file:
        line = file.readline(100_000)
    try:
        return not line or {"kind", "iteration"} <= parse_object(line).keys()
    except ValueError:
        return False
