"""Files and directories that appear under their name only once they are complete.

Everything is written under a temporary name in the same directory and renamed at the end: a file under a new one, a
directory as `.NAME.partial` (`claimed_directory.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


def partial_path(path: Path) -> Path:
    """The temporary name of a directory: `.NAME.partial` beside it."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_file(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block ends without an exception.

    Args:
        fsync: wait until the content and the new name have reached the disk.

    Raises:
        UserError: the file cannot be written; any OSError in the block is reported this way.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # nothing is written through a link
        yield partial
        if fsync:
            fsync_path(partial)
        partial.replace(path)
        if fsync:
            fsync_path(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or its directory is not accessible
            partial.unlink()


def write_text_atomically(path: Path, text: str, *, fsync: bool = False) -> None:
    """Replace the content of `path` by `text` in UTF-8; a reader sees the old file or the new one.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_file(path, fsync=fsync) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def created_directory(path: Path) -> Iterator[None]:
    """Create `path` and its missing parents; at the end of the block, remove those of them that are still empty."""
    created = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for directory in created:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def fsync_path(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error to raise when writing `path` failed."""
    return UserError(f"{path}: cannot be written: {error.strerror or error}")
