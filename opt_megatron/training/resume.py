"""The checkpoints of a run: what is put into them, and how a run is resumed from the newest intact one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel

from ..checkpoint.formats.lora_run import LORA_FILE, lora_file_text
from ..config import dtype_name
from ..errors import UserError
from ..files import read_bounded
from ..parallel.context import ParallelContext
from ..tokenizer import tokenizer_files
from .checkpointing.integrity import newest_intact_checkpoint, saved_checkpoints
from .checkpointing.manager import CheckpointManager
from .checkpointing.mezo_checkpoints import is_mezo_checkpoint
from .checkpointing.run_checkpoints import RunCheckpoints, TrainingState
from .model_setup import seed_dropout
from .optimizer import TrainingOptimizer
from .training_options import TrainingOptions


def make_checkpoint_manager(options: TrainingOptions, parallel: ParallelContext) -> CheckpointManager | None:
    """The manager of the run's checkpoints, or None if nothing is saved."""
    if options.directory is None:
        return None
    return CheckpointManager(
        options.directory,
        parallel,
        keep=options.keep_last,
        companions=companions_of(options) if parallel.is_leader else {},
        background=not options.no_async_save,
    )


def companions_of(options: TrainingOptions) -> dict[str, bytes]:
    """The files that make a checkpoint loadable: config, LoRA options, tokenizer, and how the model generates."""
    config = options.config.replace(dtype=dtype_name(options.dtype)).to_hf()
    files = {"config.json": json.dumps(config, indent=2, sort_keys=True).encode()}
    if options.lora_layers:
        files[LORA_FILE] = lora_file_text(options.lora_layers, options.base_model).encode()
    paths = {} if options.tokenizer is None else tokenizer_files(options.tokenizer)
    if options.load is not None:
        load, name = Path(options.load), "generation_config.json"
        paths[name] = load.with_name(name) if load.is_file() else load / name
    return files | {name: read_bounded(path) for name, path in paths.items() if path.is_file()}


def resume(
    options: TrainingOptions,
    model: DistributedDataParallel,
    optimizer: TrainingOptimizer,
    checkpoints: CheckpointManager | None,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
) -> TrainingState:
    """Restore the newest intact checkpoint, or return the state of a new run if there is none. Collective.

    Raises:
        UserError: on every rank; the checkpoints belong to a run with other options, or none of them is intact.
    """
    identity = run_identity(options)
    if checkpoints is None:
        return TrainingState(run=identity)
    path = find_checkpoint(checkpoints, parallel, print_line, is_mezo=False)
    if path is None:
        return TrainingState(run=identity)
    state, same_layout = checkpoints.read_state(path)
    check_identity(state.run or {}, identity, path)
    checkpoints.load(path, model.module, optimizer, same_layout=same_layout)
    if not same_layout:  # random states cannot be restored, and those of the first step must not come again
        seed_dropout(options.seed + state.iteration, parallel)
    print_line(f"resumed from {path}: iteration {state.iteration}, {state.consumed_samples} sequences")
    state.run = identity
    return state


def find_checkpoint(
    checkpoints: RunCheckpoints, parallel: ParallelContext, print_line: Callable[[str], None], *, is_mezo: bool
) -> Path | None:
    """The newest intact checkpoint, or None if there is none at all. Collective.

    Raises:
        UserError: on every rank; all are damaged, or the run had the other optimizer (`is_mezo`).
    """
    checkpoints.remove_unfinished()
    path = newest_intact_checkpoint(checkpoints.directory, parallel, print_line)
    if path is None:
        num_damaged = parallel.broadcast_object(len(saved_checkpoints(checkpoints.directory)))
        if num_damaged:
            raise UserError(
                f"--save {checkpoints.directory}: none of its {num_damaged} checkpoints is whole; "
                "move them away to begin anew"
            )
    elif is_mezo != parallel.broadcast_object(is_mezo_checkpoint(path)):
        theirs, ours = ("Adam", "mezo") if is_mezo else ("MeZO", "adam")
        raise UserError(f"{path}: is of a run with {theirs}: use another --save than with --optimizer {ours}")
    return path


def run_identity(options: TrainingOptions) -> dict[str, Any]:
    """What must be the same when a run is resumed: the model, and all that the order of the data depends on."""
    trainer = options.trainer
    model = options.config.to_hf()
    return {
        "config": {name: model[name] for name in sorted(model) if name not in ("dtype", "torch_dtype")},
        "lora": _lora_identity(options),
        "mezo": asdict(options.mezo) if options.mezo else None,
        "dtype": str(options.dtype),
        "seed": options.seed,
        "seq_length": trainer.seq_length,
        "global_batch_size": trainer.global_batch_size,
        "train_iters": trainer.train_iters,
        "data": _data_identity(options),
    }


def _lora_identity(options: TrainingOptions) -> dict[str, Any] | str | None:
    if options.adapter is not None:
        ranks = sorted({layer.rank for layer in options.lora_layers.values()})
        return f"an adapter of {len(options.lora_layers)} layers, rank {', '.join(map(str, ranks))}"
    return asdict(options.lora) if options.lora else None


def _data_identity(options: TrainingOptions) -> list[Any]:
    """The sizes of the files, which may have been moved, and how they are mixed."""
    if options.supervised is not None:
        return [Path(name).stat().st_size for name in options.supervised.train or ()]
    if options.data is None:
        return []
    words = options.data.train_data_path or options.data.data_path or ()
    files = [Path(f"{word}.bin") for word in words]
    sizes = [file.stat().st_size if file.is_file() else word for file, word in zip(files, words, strict=True)]
    return [*sizes, options.data.split if options.data.data_path else ""]


def check_identity(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Compare the `run_identity` of a checkpoint with that of the run that would go on from it.

    Raises:
        UserError: they differ.
    """
    now = json.loads(json.dumps(now))
    saved, now = ({**values, **(values.get("config") or {})} for values in (saved, now))
    different = [
        f"{name} was {saved.get(name)} and is {now[name]}"
        for name in now
        if name != "config" and saved.get(name) != now[name]
    ]
    if different:
        raise UserError(
            f"{path}: belongs to another run ({'; '.join(different)[:600]}); use the same settings, or another --save "
            "with --load to begin a new run from its weights"
        )
