"""A directory that appears complete or not at all, and whose writing can be resumed after an interruption.

It is written as `.NAME.partial` beside its final path, with a journal of what is complete, and renamed at the
end. A process that is killed leaves the partial directory behind; the next one empties it or, when asked to resume,
continues it. One that this program has not made is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import UserError
from .atomic import cannot_write, created_directory, fsync_path, partial_path
from .claimed_directory import (
    JOURNAL,
    check_claimed,
    claim_directory,
    first_entry,
    publish_directory,
    read_journal,
    recover_directory,
)
from .lock import file_lock

_BYTES_PER_FSYNC = 2**30
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartialDirectory:
    """Use as a context manager, write into `path`, and call `publish` at the end of the block.

    Without `publish`, everything is removed. With a fingerprint it stays after Ctrl-C and where the disk is full, so
    that a later run can resume.

    Args:
        target: the final path.
        fingerprint: what is written, as values that JSON can hold; a run resumes only one with an equal fingerprint.
            None: it cannot be resumed.
        resume: continue what an interrupted run has left. Otherwise it is removed.
        fsync: wait for the disk before the journal says that something is complete, and before publishing.

    Attributes:
        path: where to write.
        restarted: there was something to resume, but with another fingerprint, and it was removed.
        done: name -> hash of what an earlier run has completed or `record` was called for.

    Raises (on entering or leaving):
        UserError: the directory cannot be written, another process is writing it, or something that this program has
            not made has its temporary name.
    """

    def __init__(
        self, target: Path, fingerprint: dict[str, Any] | None = None, *, resume: bool = False, fsync: bool = False
    ) -> None:
        self.path = partial_path(target)
        self.done: dict[str, str] = {}
        self.restarted = False
        self._target = target
        self._fingerprint = json.loads(json.dumps(fingerprint))
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
                recover_directory(self._target)
                with contextlib.suppress(FileExistsError):
                    self.path.mkdir()
                check_claimed(self.path)
                # The lock is on the directory, which keeps it under its final name; the journal is removed earlier.
                stack.enter_context(file_lock(self.path, busy))
                self._resume_or_clear()
                self._journal = stack.enter_context((self.path / JOURNAL).open("a", encoding="utf-8"))
            except OSError as error:
                raise cannot_write(self._target, error) from error
            self._stack = stack.pop_all()
        return self

    def _resume_or_clear(self) -> None:
        entries = read_journal(self.path)
        if self._resume and entries and entries[0] == first_entry(self._fingerprint):
            self.done = {entry["name"]: entry["hash"] for entry in entries if "name" in entry}
            text = "".join(json.dumps(entry) + "\n" for entry in entries)  # without the half of a last line
            (self.path / JOURNAL).write_text(text, encoding="utf-8")
            return
        self.restarted = self._resume and bool(entries)
        claim_directory(self.path, self._fingerprint)

    def record(self, name: str, digest: str, num_bytes: int) -> None:
        """Note in the journal that the data of one tensor is complete in all files.

        With fsync the note is written only once the data has reached the disk, a gibibyte at a time.
        """
        self.done[name] = digest
        self._pending.append({"name": name, "hash": digest})
        self._pending_bytes += num_bytes
        if not self._fsync or self._pending_bytes >= _BYTES_PER_FSYNC:
            self.flush()

    def flush(self) -> None:
        """Write what `record` has noted into the journal now; with fsync, once the data have reached the disk."""
        if self._fsync:
            self._fsync_files()
        for entry in self._pending:
            self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        self._pending, self._pending_bytes = [], 0

    def _fsync_files(self) -> None:
        for path in sorted(self.path.rglob("*")):
            fsync_path(path)

    def publish(self, *, replace: bool = False) -> None:
        """Rename the directory to its final name.

        Args:
            replace: remove the directory that has this name. Otherwise only an empty one is replaced.
        """
        if self._fsync:
            self._fsync_files()
            fsync_path(self.path)
        publish_directory(self.path, self._target, replace=replace, fsync=self._fsync)
        self._published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_full = isinstance(error, OSError) and error.errno in _NO_ROOM
        is_kept = self._fingerprint is not None and (is_full or isinstance(error, KeyboardInterrupt))
        with self._stack:
            if is_kept:
                with contextlib.suppress(OSError):  # a full disk: these tensors are written again
                    self.flush()
            elif not self._published:
                shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            kept = f"what is finished stays in {self.path}: make room, and go on with --resume"
            left = kept if is_kept else "nothing was left there"
            raise UserError(f"{cannot_write(self._target, error)}; {left}") from error
