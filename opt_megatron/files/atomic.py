"""Files and directories that appear under their name only once they are complete.

Everything is written under a temporary name in the same directory, `.NAME.partial`, and renamed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

_STAGING_PREFIX = ".building-"
_STALE_SECONDS = 24 * 3600  # a staging directory of this age belongs to a process that was killed


def partial_path(path: Path) -> Path:
    """The temporary name under which `path` is written: `.NAME.partial` in the same directory."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_file(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block ends without an exception.

    Args:
        fsync: wait until the content and the new name have reached the disk.

    Raises:
        UserError: the file cannot be written; any OSError in the block is reported this way.
    """
    partial = partial_path(path)
    try:
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


def replace_directory(source: Path, target: Path, *, fsync: bool = False) -> None:
    """Rename the directory `source` to `target` and remove the directory that had this name.

    The old directory is called `.NAME.replaced` in between; `restore_replaced` undoes that after a crash.
    """
    replaced = _replaced_path(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    if fsync:
        fsync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(target: Path) -> None:
    """Restore the old directory if a process was killed between the two renames of `replace_directory`."""
    replaced = _replaced_path(target)
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def _replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


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


def staging_directory(parent: Path) -> Path:
    """Create a new directory under `parent` for this process alone, to be renamed or removed by the caller.

    Staging directories that a killed process left behind more than a day ago are removed.
    """
    for stale in parent.glob(f"{_STAGING_PREFIX}*"):
        if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(stale, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=parent))
    path.chmod(0o755)  # mkdtemp makes it unreadable for other users, who may share the result
    return path


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
