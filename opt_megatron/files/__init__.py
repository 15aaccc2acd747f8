"""The package's one way to write files and directories atomically, to read text files, to lock, to show progress."""

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
from .progress import ProgressLines, progress_bar
from .regular import open_regular, read_bounded, read_text, special_kind

__all__ = [
    "PartialDirectory",
    "ProgressLines",
    "atomic_file",
    "cannot_write",
    "created_directory",
    "file_lock",
    "fsync_path",
    "open_regular",
    "partial_path",
    "progress_bar",
    "read_bounded",
    "read_text",
    "replace_directory",
    "restore_replaced",
    "special_kind",
    "staging_directory",
    "write_text_atomically",
]
