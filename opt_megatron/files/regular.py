"""Reading files that people bring: only regular files, and no more than a limit.

Opening a named pipe (FIFO) waits until somebody writes into it, and reading a device may never end.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path
from typing import IO

MOST_BYTES = 64 * 2**20  # of a JSON or text file; the largest tokenizer.json that is known has 33 MB
_MOST_OPEN = 65_536
_GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # a pointer's first line (git-lfs, docs/spec.md)
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_OWN_DESCRIPTORS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


def special_kind(status: os.stat_result) -> str | None:
    """What a path is, in words, if it is neither a regular file nor a directory."""
    kind = stat.S_IFMT(status.st_mode)
    return None if kind == stat.S_IFDIR else _KINDS.get(kind)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file, open for reading; it never waits.

    Checkpoints of a thousand ranks have more files than many systems let a process open at first: the limit is raised
    as far as the system allows.

    Raises:
        OSError: it cannot be opened, or is something else; `strerror` says what.
    """
    _check_kind(path, os.stat(path))  # opening a device may already do something
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_limit():
            raise
        descriptor = os.open(path, _FLAGS)
    try:
        _check_kind(path, os.fstat(descriptor))  # a pipe may have taken the file's place since
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _raise_limit() -> bool:
    """Raise this process's limit of open files; returns whether it is higher now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


def open_input(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file that a user has named, open for reading: a regular one, or what this process has open already.

    The latter is /dev/stdin, and /dev/fd/63, as a shell's `<(command)` names a pipe.

    Raises:
        OSError: as for `open_regular`.
    """
    if os.fspath(path).startswith(_OWN_DESCRIPTORS):
        return open(path, "rb")
    return os.fdopen(open_regular(path), "rb")


def _check_kind(path: str | os.PathLike[str], status: os.stat_result) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", os.fspath(path))


def git_lfs_pointer(start: bytes) -> str | None:
    """What to say of a file that begins with these bytes, if it is what git shows where git-lfs has not fetched it."""
    if not start.startswith(_GIT_LFS_POINTER):
        return None
    return "is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository, or download this file"


def read_bounded(path: Path, limit: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, is a pointer of git-lfs, or has more bytes; `strerror` says
            which.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:  # the latter: it grows meanwhile
        message = f"has {max(size, len(content)):,} bytes, more than the {limit:,} that such a file may have"
        raise OSError(errno.EFBIG, message, str(path))
    pointer = git_lfs_pointer(content)
    if pointer is not None:
        raise OSError(errno.EINVAL, pointer, str(path))
    return content


def read_text(path: Path, limit: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8.

    Raises:
        OSError: as for `read_bounded`.
        ValueError: it is not UTF-8.
    """
    return read_bounded(path, limit).decode("utf-8")
