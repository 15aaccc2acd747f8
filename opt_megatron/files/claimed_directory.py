"""Directories that this program makes under a temporary name: it knows its own, and touches no other.

A journal in the directory says so. Its lines are JSON; the first one is `{"made_by": "opt_megatron", ...}`. A directory
is published by giving it its final name, and then the journal is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import fsync_path, partial_path
from .regular import open_regular

JOURNAL = "journal.jsonl"
_MADE_BY = {"made_by": "opt_megatron"}
_REPLACES = "replaces"
_STAGING_PREFIX = ".building-"
_STALE_SECONDS = 24 * 3600  # a staging directory of this age belongs to a process that was killed
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def claim_directory(path: Path, fingerprint: dict[str, Any] | None = None) -> None:
    """Create a directory of this program's, or empty the one that an earlier run has left there.

    Args:
        fingerprint: what is written there, for the journal's first line.

    Raises:
        UserError: the path is a link, or something that this program has not made.
        OSError: it cannot be written.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    check_claimed(path)
    for child in path.iterdir():
        if child.name != JOURNAL:
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    (path / JOURNAL).write_text(json.dumps(first_entry(fingerprint)) + "\n", encoding="utf-8")


def first_entry(fingerprint: dict[str, Any] | None) -> dict[str, Any]:
    """The journal's first line of a directory in which this is written."""
    return {**_MADE_BY, "fingerprint": fingerprint}


def staging_directory(parent: Path) -> Path:
    """Create a new directory under `parent` for this process alone, to be published or removed by the caller.

    Staging directories that a killed process left behind more than a day ago are removed.
    """
    for stale in parent.glob(f"{_STAGING_PREFIX}*"):
        if is_claimed(stale) and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=parent))
    path.chmod(0o755)  # mkdtemp makes it unreadable for other users, who may share the result
    claim_directory(path)
    return path


def check_claimed(path: Path) -> None:
    """Raise UserError unless `path` is a directory that this program has made; an empty one counts as such."""
    if not is_claimed(path):
        raise UserError(
            f"{path}: is {'a link' if path.is_symlink() else 'there'} and was not made by this program, which writes "
            "under this name first; move it away"
        )


def is_claimed(path: Path) -> bool:
    """Whether `path` is a directory, not a link, that is empty or has this program's journal and no links in it."""
    if path.is_symlink() or not path.is_dir():
        return False
    if not read_journal(path):  # the process may have been killed before it wrote the first line
        return all(child.name == JOURNAL and child.lstat().st_size == 0 for child in path.iterdir())
    return not any(child.is_symlink() for child in path.rglob("*"))


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """The journal's entries; empty if there is no journal of this program's."""
    entries: list[dict[str, Any]] = []
    try:
        if (directory / JOURNAL).is_symlink():
            return []
        with os.fdopen(open_regular(directory / JOURNAL), encoding="utf-8") as file:
            for line in file:
                entries.append(json.loads(line))
    except (OSError, ValueError):  # there is none; the process was killed in the middle of a line
        pass
    is_ours = entries and all(isinstance(entry, dict) for entry in entries) and _MADE_BY.items() <= entries[0].items()
    return entries if is_ours else []


def publish_directory(path: Path, target: Path, *, replace: bool = False, fsync: bool = False) -> None:
    """Give a claimed directory its final name.

    Where the system can exchange two names, there is no moment without `target`. Elsewhere the old directory is called
    `.NAME.replaced` in between. `recover_directory` finishes what a killed process has begun.

    Args:
        replace: remove the directory that has this name. Otherwise only an empty one is replaced.

    Raises:
        OSError: it cannot be renamed; for one, there is a directory with content and `replace` is not set.
    """
    old = None
    if replace and target.exists():
        with (path / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({_REPLACES: _identity(target)}) + "\n")
        old = _swap(path, target)
    else:
        path.rename(target)
    if fsync:
        fsync_path(target.parent)
    if old is not None and old.is_symlink():
        old.unlink()
    elif old is not None:
        shutil.rmtree(old, ignore_errors=True)
    (target / JOURNAL).unlink(missing_ok=True)


def recover_directory(target: Path) -> None:
    """Finish or undo what a process that was killed in `publish_directory` has left.

    Raises:
        OSError: a directory cannot be renamed or written.
    """
    replaced = _replaced_path(target)
    if not target.exists():
        if replaced.is_dir() and not replaced.is_symlink():
            replaced.rename(target)
        return
    entries = read_journal(target)
    for old in (partial_path(target), replaced) if entries else ():
        if old.is_dir() and not old.is_symlink() and _identity(old) == entries[-1].get(_REPLACES):
            shutil.rmtree(old)
    if entries:
        (target / JOURNAL).unlink(missing_ok=True)


def _swap(path: Path, target: Path) -> Path:
    """Give `path` the name `target`; returns the name that the directory of this name has now."""
    if _exchange(path, target):
        return path
    replaced = _replaced_path(target)
    if os.path.lexists(replaced):
        raise UserError(f"{replaced}: is there, and {target.name} is to be called so for a moment; move it away")
    target.rename(replaced)
    path.rename(target)
    return replaced


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names at once (Linux, renameat2(2)); returns whether the system and the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino]


def _replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
