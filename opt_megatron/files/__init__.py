"""The package's one way to write files and directories atomically, to lock them, and to show progress."""

from .atomic import (
    atomic_file,
    cannot_write,
    created_directory,
    fsync_path,
    partial_path,
    replace_directory,
    restore_replaced,
    staging_directory,
    write_text_atomically,
)
from .lock import file_lock
from .partial_directory import PartialDirectory
from .progress import progress_bar

__all__ = [
    "PartialDirectory",
    "atomic_file",
    "cannot_write",
    "created_directory",
    "file_lock",
    "fsync_path",
    "partial_path",
    "progress_bar",
    "replace_directory",
    "restore_replaced",
    "staging_directory",
    "write_text_atomically",
]
