"""Which format a checkpoint is in, told by its files and never by a flag."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError, UserError, shorten
from ..checkpoint import Checkpoint
from .flagai import is_flagai, open_flagai
from .huggingface import is_huggingface, open_huggingface
from .megatron import is_megatron, open_megatron
from .metaseq import is_metaseq, open_metaseq
from .torch_dist import is_torch_dist, open_torch_dist

# In this order: a training run has Megatron-LM's tracker file too, a Megatron directory may hold Hugging Face's
# files beside its own, FlagAI's names are more special than Hugging Face's, and metaseq's are any .pt.
_FORMATS = (
    (is_torch_dist, open_torch_dist),
    (is_megatron, open_megatron),
    (is_flagai, open_flagai),
    (is_huggingface, open_huggingface),
    (is_metaseq, open_metaseq),
)


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory holds weights in a format that can be read."""
    return any(recognise(directory) for recognise, _ in _FORMATS)


def open_checkpoint(path: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a checkpoint lazily and compare its tensors with its config.

    Args:
        path: a directory, or one file that is a whole model.
        config: instead of the one that the files carry or that is derived from them.

    Raises:
        CheckpointError: there is no checkpoint, or it is incomplete, damaged or not what its config says.
    """
    path = Path(path)
    try:
        with _without_garbage_collection():
            checkpoint = _open(path, config)
        checkpoint.check_tensors()
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        # The readers check what they can think of; what else a damaged or hostile file may hold ends here.
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:160]}") from error
    return checkpoint


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The raw files of 175B become millions of objects, none of them garbage; looking for it takes half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(path: Path, config: OPTConfig | None) -> Checkpoint:
    if path.is_file() and path.suffix == ".pt":
        return open_metaseq(path, config)
    if path.is_file() and path.suffix in (".safetensors", ".bin"):
        return open_huggingface(path, config)
    if path.is_dir():
        for recognise, open_format in _FORMATS:
            if recognise(path):
                return open_format(path, config)
    raise CheckpointError(f"{path}: {_what_is_there(path)}")


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "there is no such directory; give a checkpoint directory or a model name"
    if path.is_file():
        return "is a file, and not one that is a whole model by itself; give the directory that it stands in"
    names = sorted(child.name for child in path.iterdir())
    return f"holds no weights that are known here; it holds {shorten(names) if names else 'nothing'}"
