"""Conversion: any checkpoint that can be read, to any format that can be written, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..config import OPTConfig, check_dtype
from ..errors import CheckpointError, UserError, shorten
from ..files import PartialDirectory, restore_replaced
from ..parallel.layout import check_model_divides, check_sizes
from ..tokenizer import TOKENIZER_FILES, OPTTokenizer
from .checkpoint import Checkpoint
from .formats.megatron import TRACKER
from .formats.registry import is_checkpoint, open_checkpoint
from .formats.writers import (
    DtypeOf,
    OutputFile,
    flagai_files,
    huggingface_files,
    megatron_files,
    metaseq_files,
    pipeline_stages,
)
from .manifest import write_manifest
from .storage.lazy_tensor import dtype_name
from .write import create_files, write_tensors

FORMATS = ("megatron", "hf", "metaseq", "flagai")

# Names that stand in a checkpoint's directory. One that holds anything else is never replaced.
_PART_OF_A_CHECKPOINT = re.compile(
    r"config\.json|generation_config\.json|vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|opt_megatron_manifest\.json|latest_checkpointed_iteration\.txt|release|iter_\d+"
    r"|.*\.safetensors|.*\.index\.json|pytorch_model.*\.bin|.*\.pt|README\.md|LICENSE.*|\.gitattributes"
)


@dataclass(frozen=True)
class ConversionOptions:
    """What to write.

    Attributes:
        to: one of FORMATS.
        tensor_model_parallel_size: ranks of Megatron, parts of metaseq and FlagAI.
        first_stage_layers, last_stage_layers: Megatron's uneven pipeline; None for as many as the others.
        dtype: cast to this; None keeps every tensor's bits.
        max_shard_bytes: of Hugging Face's files.

    Raises:
        UserError: a value is out of its range, or does not belong to the format.
    """

    to: str = "megatron"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise UserError(f"--to {self.to} is not one of {', '.join(FORMATS)}")
        if self.dtype is not None:
            check_dtype(self.dtype)
        check_sizes(self.tensor_model_parallel_size, self.pipeline_model_parallel_size)
        if self.to != "megatron" and self.pipeline_model_parallel_size > 1:
            raise UserError(f"--to {self.to} has no pipeline stages; leave --pipeline-model-parallel-size at 1")
        if self.to == "hf" and self.tensor_model_parallel_size > 1:
            raise UserError("--to hf has whole tensors; leave --tensor-model-parallel-size at 1")
        if self.to != "megatron" and (self.first_stage_layers, self.last_stage_layers) != (None, None):
            raise UserError(f"--to {self.to} has no pipeline stages; leave the numbers of their layers out")
        if self.max_shard_bytes < 1:
            raise UserError(f"the largest shard is {self.max_shard_bytes} bytes, but must be at least 1")


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did: sizes in bytes; `notes` are sentences for the user."""

    source_format: str
    num_bytes: int
    num_files: int
    config_notes: list[str]
    notes: list[str]


def convert(
    source: Path,
    target: Path,
    options: ConversionOptions,
    *,
    config: OPTConfig | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    resume: bool = False,
    workers: int = 2,
    fsync: bool = True,
    on_start: Callable[[int], None] = lambda total: None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> ConversionSummary:
    """Convert.

    Args:
        config: instead of the source's own.
        tokenizer: directory of tokenizer files to copy beside the weights; by default the source's.
        force: replace a target that is a checkpoint already.
        resume: go on from what an interrupted run with the same source and options has written.
        fsync: flush everything to the disk before the target appears.
        on_start: called with the bytes that will be written; progress: with those written since its last call.

    Raises:
        UserError: the model does not divide by the sizes, the target exists, or it cannot be written.
        CheckpointError: the source or the tokenizer cannot be read.
    """
    target = resolved_target(target)
    restore_replaced(target)
    check_target(source, target, force)
    if tokenizer is not None:
        OPTTokenizer.from_directory(tokenizer)  # says what is wrong with it before the work begins
    checkpoint = open_checkpoint(source, config)
    dtypes = {name: options.dtype or dtype_name(tensor.dtype) for name, tensor in checkpoint.tensors.items()}
    files = output_files(checkpoint.config, options, lambda name: getattr(torch, dtypes[name]))
    total = sum(file.num_bytes for file in files)
    on_start(total)
    with PartialDirectory(target, _fingerprint(checkpoint, options), resume=resume, fsync=fsync) as partial:
        places, complete = create_files(partial.path, files)
        if not complete:  # a file of the interrupted run is gone or has another size: nothing of it is trusted
            partial.done.clear()
        write_tensors(
            checkpoint,
            places,
            workers=workers,
            done=dict(partial.done),
            on_tensor=partial.record,
            progress=progress,
        )
        written = _write_rest(checkpoint, tokenizer, partial.path, options, files)
        write_manifest(partial.path, checkpoint, written, asdict(options), dtypes, partial.done)
        partial.publish(replace=force)
    return ConversionSummary(
        checkpoint.format_description,
        total,
        len(files),
        checkpoint.config_notes,
        _notes(partial, options, checkpoint.config),
    )


def output_files(config: OPTConfig, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
    """The files that a conversion writes.

    Raises:
        UserError: the model does not divide by the sizes.
    """
    if options.to == "hf":
        return huggingface_files(config, dtype_of, options.max_shard_bytes)
    tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    check_model_divides(config, tp, 1)
    if options.to == "metaseq":
        return metaseq_files(config, dtype_of, tp)
    if options.to == "flagai":
        return flagai_files(config, dtype_of, tp)
    stages = pipeline_stages(config.num_layers, pp, options.first_stage_layers, options.last_stage_layers)
    return megatron_files(config, dtype_of, tp, stages)


def resolved_target(target: Path) -> Path:
    """Where a target really is: links are followed, so that what they point to is written.

    Raises:
        UserError: it cannot be looked up.
    """
    try:
        return target.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(target)[:100]!r}: is no path that can be written: {error}") from None


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise UserError unless `target` may be written: new, empty, or nothing but a checkpoint and `force` is set."""
    try:
        if target == source.resolve() or target in source.resolve().parents:
            raise UserError(f"{target}: is the source or holds it; give another directory to --save")
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: is not a directory; give another one to --save")
        if not target.is_dir() or not any(target.iterdir()):
            return
        strange = [child.name for child in target.iterdir() if not _PART_OF_A_CHECKPOINT.fullmatch(child.name)]
        if strange or not is_checkpoint(target):
            what = f"holds {shorten(sorted(strange), 3)}" if strange else "is not empty"
            raise UserError(f"{target}: {what} and is no checkpoint alone, so it is left alone; give another --save")
    except OSError as error:
        raise UserError(f"{target}: cannot be looked at: {error.strerror}") from None
    if not force:
        raise UserError(f"{target}: is a checkpoint already; --force replaces it")


def _write_rest(
    checkpoint: Checkpoint, tokenizer: Path | None, directory: Path, options: ConversionOptions, files: list[OutputFile]
) -> OPTConfig:
    """Everything beside the weights: config (which is returned), tokenizer, and the format's own small files."""
    config = checkpoint.config.replace(dtype=options.dtype or dtype_name(next(iter(checkpoint.tensors.values())).dtype))
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    source = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for names, origin in ((TOKENIZER_FILES, tokenizer or source), (("generation_config.json",), source)):
        for name in names:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, directory / name)
    if options.to == "megatron":
        (directory / TRACKER).write_text("release\n", encoding="utf-8")
    if options.to == "hf" and len(files) > 1:
        weight_map = {stored.name: file.path.name for file in files for stored in file.tensors}
        index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return config


def _notes(partial: PartialDirectory, options: ConversionOptions, config: OPTConfig) -> list[str]:
    notes = []
    if partial.restarted:
        notes.append("--resume: what was there came from another source or other options, so it began anew")
    pp = options.pipeline_model_parallel_size
    if options.to == "megatron" and config.num_layers % pp:
        sizes = f"sizes that divide {config.num_layers}"
        notes.append(f"stages of unequal length are for Megatron-LM; here the directory loads at {sizes}")
    return notes


def _fingerprint(checkpoint: Checkpoint, options: ConversionOptions) -> dict:
    """What must be the same for an interrupted run to go on."""
    path = checkpoint.path
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise CheckpointError(f"{path}: is empty")
    stamps = [[str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"source": str(path.resolve()), "files": stamps, "config": asdict(checkpoint.config), **asdict(options)}
