"""A directory that appears complete or not at all, and whose writing can be resumed after an interruption.

It is written as `.NAME.partial` beside its final path, with a journal of what is complete, and renamed at the
end. A process that is killed leaves the partial directory behind; the next one removes it or, when asked to resume,
continues it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import UserError
from .atomic import cannot_write, created_directory, fsync_path, partial_path, replace_directory
from .lock import file_lock

_JOURNAL = "journal.jsonl"
_BYTES_PER_FSYNC = 2**30


class PartialDirectory:
    """Use as a context manager, write into `path`, and call `publish` at the end of the block.

    Without `publish`, everything is removed; after Ctrl-C it stays, so that a later run can resume.

    Args:
        target: the final path.
        fingerprint: what is written, as values that JSON can hold; a run resumes only one with an equal fingerprint.
        resume: continue what an interrupted run has left. Otherwise it is removed.
        fsync: wait for the disk before the journal says that something is complete, and before publishing.

    Attributes:
        path: where to write.
        restarted: there was something to resume, but with another fingerprint, and it was removed.
        done: name -> hash of what an earlier run has completed or `record` was called for.

    Raises (on entering or leaving):
        UserError: the directory cannot be written, or another process is writing it.
    """

    def __init__(
        self, target: Path, fingerprint: dict[str, Any] | None = None, *, resume: bool = False, fsync: bool = False
    ) -> None:
        self.path = partial_path(target)
        self.done: dict[str, str] = {}
        self.restarted = False
        self._target = target
        self._fingerprint = json.loads(json.dumps(fingerprint or {}))
        self._resume = resume
        self._fsync = fsync
        self._stack = contextlib.ExitStack()
        self._journal: TextIO
        self._pending: list[dict[str, str]] = []
        self._pending_bytes = 0
        self._published = False

    def __enter__(self) -> PartialDirectory:
        busy = f"{self._target}: another process is writing it just now ({self.path})"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(created_directory(self._target.parent))
                self.path.mkdir(exist_ok=True)
                # The lock is on the directory, which keeps it under its final name; the journal is removed earlier.
                stack.enter_context(file_lock(self.path, busy))
                self._journal = stack.enter_context((self.path / _JOURNAL).open("a+", encoding="utf-8"))
                self._resume_or_clear()
            except OSError as error:
                raise self._cannot_write(error) from error
            self._stack = stack.pop_all()
        return self

    def _resume_or_clear(self) -> None:
        self._journal.seek(0)
        entries = _parse_journal(self._journal.read())
        if self._resume and entries and entries[0] == self._fingerprint:
            self.done = {entry["name"]: entry["hash"] for entry in entries[1:]}
            return
        self.restarted = self._resume and bool(entries)
        for child in self.path.iterdir():
            if child.name != _JOURNAL:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        self._journal.truncate(0)
        self._append(self._fingerprint)

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def record(self, name: str, digest: str, num_bytes: int) -> None:
        """Note in the journal that the data of one tensor is complete in all files.

        With fsync the note is written only once the data has reached the disk, a gibibyte at a time.
        """
        self.done[name] = digest
        self._pending.append({"name": name, "hash": digest})
        self._pending_bytes += num_bytes
        if not self._fsync or self._pending_bytes >= _BYTES_PER_FSYNC:
            self._write_pending()

    def _write_pending(self) -> None:
        if self._fsync:
            self._fsync_files()
        for entry in self._pending:
            self._append(entry)
        self._pending, self._pending_bytes = [], 0

    def _fsync_files(self) -> None:
        for path in sorted(self.path.rglob("*")):
            fsync_path(path)

    def publish(self, *, replace: bool = False) -> None:
        """Rename the directory to its final name.

        Args:
            replace: remove the directory that has this name. Otherwise only an empty one is removed.
        """
        (self.path / _JOURNAL).unlink()
        if self._fsync:
            self._fsync_files()
            fsync_path(self.path)
        if self._target.exists() and not replace:
            self._target.rmdir()
        replace_directory(self.path, self._target, fsync=self._fsync)
        self._published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if isinstance(error, KeyboardInterrupt):
                self._write_pending()
            elif not self._published:
                shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"{cannot_write(self._target, error)}; nothing was left there")


def _parse_journal(text: str) -> list[dict[str, Any]]:
    entries = []
    for line in text.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the process was killed in the middle of this line
            break
    return entries
