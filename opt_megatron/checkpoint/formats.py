"""Which format a directory is in, told by its files and never by a flag."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, shorten
from .huggingface import is_huggingface, open_huggingface
from .megatron import is_megatron, open_megatron
from .view import Checkpoint

# Megatron first: a converted directory may have been written into one with Hugging Face's files.
_FORMATS = ((is_megatron, open_megatron), (is_huggingface, open_huggingface))


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory holds weights in a format that can be read."""
    return any(recognise(directory) for recognise, _ in _FORMATS)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint directory lazily and compare its tensors with its config.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete, damaged or not what its config says.
    """
    directory = Path(directory)
    for recognise, open_format in _FORMATS:
        if recognise(directory):
            checkpoint = open_format(directory)
            checkpoint.check_tensors()
            return checkpoint
    raise CheckpointError(f"{directory}: {what_is_there(directory)}")


def what_is_there(directory: Path) -> str:
    """A sentence for a directory that cannot be read as a checkpoint."""
    if not directory.exists():
        return "there is no such directory; give a checkpoint directory or a model name"
    if not directory.is_dir():
        return "is a file; give the directory that it stands in"
    names = sorted(child.name for child in directory.iterdir())
    return f"holds no weights that are known here; it holds {shorten(names) if names else 'nothing'}"
