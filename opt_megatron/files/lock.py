"""Locks between processes, on files and directories."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


@contextlib.contextmanager
def file_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold an exclusive lock on a directory, or on a file (created if it is missing), for the length of the block.

    The lock belongs to the open file, not to its name: it outlives a rename and ends with the process.

    Args:
        busy: the message of the error when another process holds the lock.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be opened, or is a link.
    """
    flags = os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(busy) from None
    try:
        yield
    finally:
        os.close(descriptor)
