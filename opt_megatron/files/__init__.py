"""The package's one way to write files and directories atomically, to read text files, to lock, to show progress."""

from .atomic import (
    atomic_file,
    cannot_write,
    created_directory,
    fsync_path,
    partial_path,
    write_text_atomically,
)
from .claimed_directory import claim_directory, is_claimed, publish_directory, recover_directory, staging_directory
from .lock import file_lock
from .partial_directory import PartialDirectory
from .progress import ProgressLines, progress_bar
from .regular import git_lfs_pointer, open_input, open_regular, read_bounded, read_text, special_kind

__all__ = [
    "PartialDirectory",
    "ProgressLines",
    "atomic_file",
    "cannot_write",
    "claim_directory",
    "created_directory",
    "file_lock",
    "fsync_path",
    "git_lfs_pointer",
    "is_claimed",
    "open_input",
    "open_regular",
    "partial_path",
    "progress_bar",
    "read_bounded",
    "read_text",
    "publish_directory",
    "recover_directory",
    "special_kind",
    "staging_directory",
    "write_text_atomically",
]
