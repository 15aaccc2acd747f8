"""The checkpoint formats. A checkpoint's format is recognised from its file names, never from a flag.

Imports neither torch nor a format until it is needed, so that `--help` lists their names at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ...config import OPTConfig
from ...errors import CheckpointError, UserError, shorten
from ...files import special_kind

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..checkpoint import Checkpoint
    from .format import Format, OutputFormat


class _Entry(NamedTuple):
    """A format: the module of this package whose `FORMAT` it is, and its name for `--to` (None: it is only read)."""

    module: str
    to: str | None = None


_ENTRIES = (  # in the order in which messages list them
    _Entry("megatron", to="megatron"),
    _Entry("huggingface", to="hf"),
    _Entry("gptq"),
    _Entry("metaseq", to="metaseq"),
    _Entry("flagai", to="flagai"),
    _Entry("peft", to="peft"),
    _Entry("torch_dist"),
    _Entry("mezo_run"),
)


def output_format_names() -> list[str]:
    """The formats that can be written, by the names that `--to` takes."""
    return [entry.to for entry in _ENTRIES if entry.to is not None]


def output_format(name: str) -> OutputFormat:
    """The format that `--to` calls `name`.

    Raises:
        UserError: there is none.
    """
    for entry in _ENTRIES:
        if entry.to is not None and entry.to == name:
            return cast("OutputFormat", _load(entry.module))
    raise UserError(f"--to {name} is not one of {', '.join(output_format_names())}")


@functools.cache
def all_formats() -> tuple[Format, ...]:
    """Every format, in the order in which their `detect` is called."""
    return tuple(sorted((_load(entry.module) for entry in _ENTRIES), key=lambda found: found.detection_rank))


def _load(module: str) -> Format:
    return importlib.import_module(f".{module}", __package__).FORMAT


def is_checkpoint(directory: Path) -> bool:
    """Whether the directory holds weights in a format that can be read."""
    return any(known.detect(directory) for known in all_formats())


def open_checkpoint(path: Path, config: OPTConfig | None = None, adapter: Path | None = None) -> Checkpoint:
    """Open a checkpoint lazily and compare its tensors with its config.

    Args:
        path: a directory, or one file that is a whole model.
        config: used instead of the one that the files hold or that is inferred from them.
        adapter: the directory of an adapter of peft, which is added to the weights.

    Raises:
        CheckpointError: there is no checkpoint or adapter, or it is incomplete, damaged or not what its config says.
    """
    path = Path(path)
    with _as_checkpoint_errors(path):
        with _without_garbage_collection():
            checkpoint = _detect(path).open(path, config)
        checkpoint.check_tensors()
        _check_size(checkpoint)
    if adapter is None:
        return checkpoint
    from ..adapter import add_adapter

    return add_adapter(checkpoint, open_adapter(adapter, checkpoint.config))


def open_adapter(path: Path, config: OPTConfig) -> Adapter:
    """Open an adapter of peft lazily, and compare its tensors with its config and with the model's.

    Raises:
        CheckpointError: there is none, or it is incomplete, damaged, for another model, or not supported.
    """
    from .peft import read_adapter

    with _as_checkpoint_errors(path):
        return read_adapter(path, config)


@contextlib.contextmanager
def _as_checkpoint_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        # The formats check what they expect of their files; anything else in a damaged or hostile file ends here.
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:160]}") from error


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The raw files of 175B become millions of objects that all stay; collecting garbage would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_size(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the tensors take more bytes than the files have, as where tensors share their storage.

    They would be allocated, and written by a conversion. A reader may add a few rows of its own.
    """
    declared, found = sum(tensor.num_bytes for tensor in checkpoint.tensors.values()), 2**20
    path = checkpoint.path
    if checkpoint.base is not None:  # which was checked when it was opened
        return
    files = [path] if path.is_file() else itertools.chain(*map(path.glob, ("*", "*/*", "*/*/*")))  # links are followed
    for file in files:
        found += file.stat().st_size if file.is_file() else 0
        if found >= declared:
            return
    raise CheckpointError(
        f"{path}: its tensors take {declared:,} bytes and its files hold {found - 2**20:,}: several tensors are one in "
        "the files, which no model of this config is; save it again from the program that made it"
    )


def _check_no_special_files(path: Path) -> None:
    """Raise CheckpointError if the path, or anything in the directory, is a pipe, a socket or a device."""
    for file in [path, *(path.iterdir() if path.is_dir() else ())]:
        kind = special_kind(file.stat()) if file.exists() else None
        if kind is not None:
            raise CheckpointError(f"{file}: is {kind}, not a regular file; move it away")


def _detect(path: Path) -> Format:
    _check_no_special_files(path)
    if path.is_file():
        for known in all_formats():
            if path.suffix in known.model_file_suffixes:
                return known
    if path.is_dir():
        for known in all_formats():
            if known.detect(path):
                return known
    raise CheckpointError(f"{path}: {_describe_contents(path)}")


def _describe_contents(path: Path) -> str:
    if not path.exists():
        return "there is no such directory; give a checkpoint directory or a model name"
    if path.is_file():
        return "is a file, and not one that is a whole model by itself; give its directory"
    names = sorted(child.name for child in path.iterdir())
    return f"holds no weights that are known here; it holds {shorten(names) if names else 'nothing'}"
