"""Conversion: any checkpoint that can be read, to Megatron-LM's layout at any TP x PP."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..config import OPTConfig, check_dtype
from ..errors import UserError
from ..tokenizer import TOKENIZER_FILES
from .assemble import fill, rank_shape
from .formats import is_checkpoint, open_checkpoint
from .megatron import TRACKER, write_rank
from .table import layers_of_stage, stage_parameters
from .view import Checkpoint

_COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")


def convert(
    source: Path,
    target: Path,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    *,
    dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `source` to `target` as a Megatron directory with `config.json` and the tokenizer beside it.

    The target appears whole or not at all: it is written under a temporary name beside it and renamed.

    Args:
        dtype: cast to this; by default every tensor's bits stay as they are.
        force: replace a target that is a checkpoint already.
        progress: called with the number of bytes written since the last call.

    Raises:
        UserError: the model does not divide by the sizes, the target exists, or the disk is full.
        CheckpointError: the source cannot be read.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_target(source, target, force)
    checkpoint = open_checkpoint(source)
    # Imported here: it is the same check that the ranks make, and the module needs torch.distributed.
    from ..parallel import check_layout

    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    check_layout(checkpoint.config, tp, pp, tp * pp)
    with _appearing_at(target, force) as directory:
        for stage in range(pp):
            for rank in range(tp):
                _write_rank(checkpoint, directory, (tp, pp), (rank, stage), dtype, progress)
        _write_rest(checkpoint.config, source, directory, dtype)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise UserError unless `target` may be written: it is new, empty, or a checkpoint and `force` is set."""
    resolved = target.resolve()
    if resolved == source.resolve() or resolved in source.resolve().parents:
        raise UserError(f"{target}: is the source or holds it; give another directory to --save")
    if target.is_file():
        raise UserError(f"{target}: is a file; give a directory to --save")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not is_checkpoint(target):
        raise UserError(f"{target}: is not empty and is no checkpoint, so it is left alone; give another --save")
    if not force:
        raise UserError(f"{target}: is a checkpoint already; --force replaces it")


def _write_rank(
    checkpoint: Checkpoint,
    directory: Path,
    layout: tuple[int, int],
    rank: tuple[int, int],
    dtype: str | None,
    progress: Callable[[int], None],
) -> None:
    (tp, pp), (tp_rank, stage) = layout, rank
    layers = layers_of_stage(checkpoint.config.num_layers, pp, stage)
    model: dict[str, Tensor] = {}
    for parameter in stage_parameters(checkpoint.config, layers, first=stage == 0, last=stage == pp - 1):
        stored = checkpoint.tensors[parameter.canonical[0]].dtype
        tensor = torch.empty(rank_shape(checkpoint, parameter, tp), dtype=getattr(torch, dtype) if dtype else stored)
        fill(tensor, checkpoint, parameter, tp_rank, tp)
        model[parameter.megatron] = tensor
        progress(tensor.numel() * tensor.element_size())
    write_rank(directory, model, checkpoint.config, next(iter(model.values())).dtype, layout, rank)


def _write_rest(config: OPTConfig, source: Path, directory: Path, dtype: str | None) -> None:
    values = config.replace(dtype=dtype or config.dtype).to_hf()
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    (directory / TRACKER).write_text("release\n", encoding="utf-8")


@contextmanager
def _appearing_at(target: Path, force: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its name when the block succeeds, else vanishes."""
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _flush(path)
        _replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}; nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        _flush(target.parent)
        return
    former = target.parent / f".{target.name}.old-{os.getpid()}"
    target.rename(former)
    temporary.rename(target)
    _flush(target.parent)
    shutil.rmtree(former)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
