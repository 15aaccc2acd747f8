"""A directory that appears whole or not at all, and that an interrupted run can go on with.

It is written under `.NAME.partial` beside its place, with a journal of what is complete, and renamed when
everything is. A run that is killed leaves the partial directory, which the next one removes or, when asked
to resume, continues.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .errors import UserError

_JOURNAL = "journal.jsonl"
_FLUSH_EVERY = 2**30  # bytes of journalled data between flushes to the disk


class PartialDirectory:
    """Use as a context manager; call `publish` at the end of the block.

    Attributes:
        path: where to write.
        restarted: there was something to resume, but of another source or other options, and it was dropped.
        done: name -> hash of what an earlier run has completed and this one has recorded since.

    Raises (on entering or leaving):
        UserError: the place cannot be written, or another process is writing it.
    """

    def __init__(self, target: Path, fingerprint: dict[str, Any], *, resume: bool, fsync: bool) -> None:
        self.path = target.parent / f".{target.name}.partial"
        self.done: dict[str, str] = {}
        self.restarted = False
        self._target = target
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._resume = resume
        self._fsync = fsync
        self._journal: TextIO | None = None
        self._lock: int | None = None
        self._pending: list[dict[str, str]] = []
        self._pending_bytes = 0
        self._published = False

    def __enter__(self) -> PartialDirectory:
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def _open(self) -> None:
        self.path.mkdir(exist_ok=True)
        # The lock is on the directory, which lives on under its final name: on the journal it would end too soon.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"{self._target}: another process is writing it just now ({self.path})") from None
        self._journal = (self.path / _JOURNAL).open("a+", encoding="utf-8")
        self._journal.seek(0)
        lines = self._read_journal(self._journal.read())
        if self._resume and lines and lines[0] == self._fingerprint:
            self.done = {line["name"]: line["hash"] for line in lines[1:]}
            return
        self.restarted = self._resume and bool(lines)
        for child in self.path.iterdir():
            if child.name != _JOURNAL:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self._journal.truncate(0)
        self._append(self._fingerprint)

    @staticmethod
    def _read_journal(text: str) -> list[dict[str, Any]]:
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the run was killed in the middle of this line
                break
        return lines

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def record(self, name: str, digest: str, num_bytes: int) -> None:
        """Note that one tensor's data is complete in all files.

        With fsync the note is only kept once the data has reached the disk, a gibibyte at a time.
        """
        self.done[name] = digest
        self._pending.append({"name": name, "hash": digest})
        self._pending_bytes += num_bytes
        if not self._fsync or self._pending_bytes >= _FLUSH_EVERY:
            self._keep_notes()

    def _keep_notes(self) -> None:
        if self._fsync:
            self._flush_files()
        for entry in self._pending:
            self._append(entry)
        self._pending, self._pending_bytes = [], 0

    def _flush_files(self) -> None:
        for path in sorted(self.path.rglob("*")):
            flush(path)

    def publish(self, *, replace: bool) -> None:
        """Flush everything, and give the directory its name; what stood there goes when `replace` is set."""
        (self.path / _JOURNAL).unlink()
        if self._fsync:
            self._flush_files()
            flush(self.path)
        former = _former(self._target)
        shutil.rmtree(former, ignore_errors=True)
        if self._target.exists():
            self._target.rename(former) if replace else self._target.rmdir()
        self.path.rename(self._target)
        self._published = True
        if self._fsync:
            flush(self._target.parent)
        shutil.rmtree(former, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            self._keep_notes()
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            os.close(self._lock)
        if not self._published and not interrupted:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{self._target}: cannot be written: {error.strerror or error}; nothing was left there")


def restore_interrupted(target: Path) -> None:
    """Give a checkpoint its name back that a run was about to replace when it was killed between two renames."""
    former = _former(target)
    if former.is_dir() and not target.exists():
        former.rename(target)


def _former(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def flush(path: Path) -> None:
    """Wait until a file or a directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
