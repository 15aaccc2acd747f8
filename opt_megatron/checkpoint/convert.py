"""Converts any checkpoint that can be read to any format that can be written, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import OPTConfig, dtype_name
from ..errors import CheckpointError
from ..files import PartialDirectory, read_bounded, recover_directory
from ..parallel.layout import check_model_divides
from ..tokenizer import OPTTokenizer, tokenizer_files
from .checkpoint import Checkpoint
from .conversion_options import ConversionOptions
from .conversion_target import check_target, resolve_target
from .formats.registry import open_checkpoint, output_format
from .manifest import write_manifest
from .output_files import DtypeOf, OutputFile
from .write import create_files, write_tensors


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did.

    Attributes:
        source_format, target_format: what was read and written, in words.
        num_bytes: size of the weights that were written.
        num_files: number of weight files.
        config_notes: sentences about what was inferred of the config.
        notes: other sentences for the user.
    """

    source_format: str
    target_format: str
    num_bytes: int
    num_files: int
    config_notes: list[str]
    notes: list[str]


def convert(
    source: Path | Checkpoint,
    target: Path,
    options: ConversionOptions,
    *,
    config: OPTConfig | None = None,
    adapter: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    resume: bool = False,
    workers: int = 2,
    fsync: bool = True,
    on_start: Callable[[int], None] = lambda total: None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> ConversionSummary:
    """Write a checkpoint in another format or layout.

    Args:
        source: the path of a checkpoint, or one that is open.
        config: instead of the source's own; not used for an open one.
        adapter: an adapter of peft that is added to the weights; not used for an open one.
        tokenizer: directory of tokenizer files to copy into the target; by default the source's.
        force: replace a target that is a checkpoint already.
        resume: continue what an interrupted run with the same source and options has written.
        workers: threads that read and write.
        fsync: flush everything to the disk before the target appears.
        on_start: called with the number of bytes that will be written.
        progress: called with the number of bytes written since the last call, from any thread.

    Raises:
        UserError: the model does not divide by the sizes, the target exists, or it cannot be written.
        CheckpointError: the source or the tokenizer cannot be read.
    """
    target = resolve_target(target)
    recover_directory(target)
    check_target(source.path if isinstance(source, Checkpoint) else source, target, force)
    if tokenizer is not None:
        OPTTokenizer.from_directory(tokenizer)  # a damaged one is reported before anything is written
    written_format = output_format(options.to)
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source, config, adapter)
    checkpoint = written_format.content(opened, options)
    dtypes = {name: options.dtype or dtype_name(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    files = output_files(checkpoint, options, lambda name: getattr(torch, dtypes[name]))
    on_start(sum(file.num_bytes for file in files))
    # Weights in memory may be others than the files of the checkpoint that they came from.
    fingerprint = None if isinstance(source, Checkpoint) else {**source_fingerprint(checkpoint), **asdict(options)}
    with PartialDirectory(target, fingerprint, resume=resume, fsync=fsync) as partial:
        _write_weights(partial, checkpoint, files, workers, progress)
        for name, text in written_format.text_files(checkpoint, files).items():
            (partial.path / name).write_text(text, encoding="utf-8")
        notes = written_format.notes(checkpoint.config, options)
        if written_format.is_whole_model:
            written = write_config_and_tokenizer(checkpoint, tokenizer, partial.path, options)
            notes += written_format.write_companions(partial.path, written, options)
            write_manifest(partial.path, checkpoint, written, asdict(options), dtypes, partial.done)
        partial.publish(replace=force)
    if partial.restarted:
        notes.insert(0, "--resume: what was there came from another source or other options, so it began anew")
    return _summary(checkpoint, options, files, notes)


def output_files(checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
    """The weight files that a conversion writes.

    Raises:
        UserError: the model does not divide by the sizes.
    """
    check_model_divides(checkpoint.config, options.tensor_model_parallel_size, 1)
    return output_format(options.to).output_files(checkpoint, options, dtype_of)


def _write_weights(
    partial: PartialDirectory,
    checkpoint: Checkpoint,
    files: list[OutputFile],
    workers: int,
    progress: Callable[[int], None],
) -> None:
    destinations, complete = create_files(partial.path, files)
    if not complete:  # a file of the interrupted run is missing or has another size: trust none of them
        partial.done.clear()
    write_tensors(
        checkpoint,
        destinations,
        workers=workers,
        done=dict(partial.done),
        on_tensor=partial.record,
        progress=progress,
    )


def write_config_and_tokenizer(
    checkpoint: Checkpoint, tokenizer: Path | None, directory: Path, options: ConversionOptions
) -> OPTConfig:
    """Write the config, which is returned, and copy the tokenizer and the generation config.

    Args:
        tokenizer: directory of the tokenizer's files; by default the source's.
    """
    config = checkpoint.config.replace(dtype=options.dtype or dtype_name(next(iter(checkpoint.tensors.values())).dtype))
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    source = checkpoint.directory
    copied = tokenizer_files(tokenizer or source) | {"generation_config.json": source / "generation_config.json"}
    for name, path in copied.items():
        if path.is_file():
            (directory / name).write_bytes(read_bounded(path))
    return config


def _summary(
    checkpoint: Checkpoint, options: ConversionOptions, files: list[OutputFile], notes: list[str]
) -> ConversionSummary:
    return ConversionSummary(
        source_format=checkpoint.format_description,
        target_format=output_format(options.to).describe_output(options),
        num_bytes=sum(file.num_bytes for file in files),
        num_files=len(files),
        config_notes=checkpoint.config_notes,
        notes=notes,
    )


def source_fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be the same of a source for an interrupted run to be continued: files with their times, and config."""
    path, adapter = checkpoint.path, checkpoint.adapter
    others = [adapter.path] if adapter is not None else []
    others += [checkpoint.base] if checkpoint.base is not None else []
    files = [stamp for place in (path, *others) for stamp in _stamps(place)]
    return {"source": str(path.resolve()), "files": files, "config": asdict(checkpoint.config)}


def _stamps(path: Path) -> list[list[Any]]:
    """Name, size and time of a file, or of each in a directory."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise CheckpointError(f"{path}: is empty")
    return [[str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
