"""From settings to a running Trainer: model, data, optimizer, checkpoints, in this order.

A run is one of three: from scratch (a config, OPT's initialisation), a fine-tuning (weights of any checkpoint),
or the resumption of either, when SAVE holds a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import nn

from ..checkpoint.formats.registry import open_checkpoint
from ..checkpoint.formats.torch_dist import LORA_FILE
from ..checkpoint.load import load_weights, locate_on_all_ranks
from ..checkpoint.parameter_mapping import layers_of_stage, stage_parameters
from ..config import OPTConfig
from ..data.dataloader import SampleDataset, num_micro_batches
from ..data.options import DataOptions, SupervisedOptions
from ..data.pretraining_dataset import build_datasets
from ..errors import UserError
from ..model.lora_options import LoRAOptions
from ..model.opt_model import build_model
from ..parallel.context import ParallelContext, on_all_ranks
from ..parallel.core_compat import prepare_training
from ..tokenizer import TOKENIZER_FILES, OPTTokenizer
from .checkpointing import Checkpoints, TrainingState
from .initialize import initialize, initialize_factors
from .optimizer import CPUOptimizer, MegatronOptimizer, TrainingOptimizer
from .options import ExecutionOptions, OptimizerOptions, SavingOptions, TrainerOptions
from .progress import Progress
from .recipe import INIT_STD
from .run_directory import RunDirectory
from .run_file import write_run_file
from .saved import newest_whole, saved_checkpoints
from .schedule import Schedule
from .trainer import SignalFlag, Trainer


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SavingOptions, ExecutionOptions):
    """A whole run.

    Attributes:
        config: the architecture, dropout included; of a fine-tuning its checkpoint's.
        load: a checkpoint whose weights the run begins with; None initialises them.
        tokenizer: directory whose files are put beside the checkpoints (and which supervised data need).
        dtype: of parameters and activations.
        run_file: the text of run.yaml, with which the run can be repeated; empty for none.
    """

    config: OPTConfig
    schedule: Schedule
    trainer: TrainerOptions
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    data: DataOptions | None = None
    supervised: SupervisedOptions | None = None
    load: str | None = None
    revision: str | None = None
    tokenizer: Path | None = None
    lora: LoRAOptions | None = None
    dtype: torch.dtype = torch.float32
    init_std: float = INIT_STD
    run_file: str = ""

    @property
    def directory(self) -> Path | None:
        """Where the run is saved."""
        return None if self.save is None else Path(self.save).expanduser()


def train(settings: TrainingOptions, parallel: ParallelContext, say: Callable[[str], None] = print) -> bool:
    """Run it; returns whether the last iteration was reached (False after a SIGTERM).

    Args:
        say: where the leader's progress lines go before there is a metrics file.

    Raises:
        UserError: on every rank.
    """
    prepare_training(parallel.device)
    _check(settings, parallel)
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(SignalFlag(signal.SIGTERM))
        if settings.directory is not None:
            directory = RunDirectory(settings.directory)
            on_all_ranks(parallel, lambda: stack.enter_context(directory) if parallel.is_leader else None)
        return _trainer(settings, parallel, say, terminated, stack).run()


def _trainer(
    settings: TrainingOptions,
    parallel: ParallelContext,
    say: Callable[[str], None],
    terminated: SignalFlag,
    stack: contextlib.ExitStack,
) -> Trainer:
    tell = say if parallel.is_leader else lambda text: None
    train_data, valid_data = build_data(settings, parallel, tell)
    model, optimizer = build(settings, parallel)
    checkpoints = _checkpoints(settings, parallel)
    state = _resume(settings, model, optimizer, checkpoints, parallel, tell)
    boards = None if settings.tensorboard_dir is None else Path(settings.tensorboard_dir)
    progress = on_all_ranks(
        parallel,
        lambda: Progress(settings.directory, boards, state.iteration) if parallel.is_leader else None,
    )
    if progress:
        stack.callback(progress.close)
    if settings.directory is not None and settings.run_file:
        write = partial(write_run_file, settings.directory, settings.run_file)
        on_all_ranks(parallel, lambda: write() if parallel.is_leader else None)
    return Trainer(
        model,
        settings.config,
        optimizer,
        settings.schedule,
        parallel,
        settings.trainer,
        train_data,
        valid_data,
        checkpoints,
        state,
        progress,
        terminated,
    )


def _check(settings: TrainingOptions, parallel: ParallelContext) -> None:
    """Raise UserError for what does not go together, before anything is built."""
    options, config = settings.trainer, settings.config
    num_micro_batches(options.global_batch_size, options.micro_batch_size, parallel.data_parallel_size)
    if options.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {options.seq_length} is more than the model's {config.max_position_embeddings} positions"
        )
    if settings.sequence_parallel and options.seq_length % parallel.tensor_model_parallel_size:
        raise UserError(
            f"--sequence-parallel divides the sequence among the tensor parallel ranks: --seq-length "
            f"{options.seq_length} is no multiple of {parallel.tensor_model_parallel_size}"
        )
    if (settings.data is None) == (settings.supervised is None):
        raise UserError("give --data-path (or --train-data-path), or --supervised-data, and not both")
    if settings.tokenizer is not None:
        on_all_ranks(parallel, lambda: _read_tokenizer(settings))


def _read_tokenizer(settings: TrainingOptions) -> OPTTokenizer:
    tokenizer = OPTTokenizer.from_directory(settings.tokenizer)
    if len(tokenizer) > settings.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model {settings.config.vocab_size} rows: "
            "it is another model's; give --tokenizer DIR"
        )
    return tokenizer


def build(settings: TrainingOptions, parallel: ParallelContext) -> tuple[nn.Module, TrainingOptimizer]:
    """The model in core's DistributedDataParallel with its first weights, and its optimizer."""
    prepare_training(parallel.device)
    seed_dropout(settings.seed, parallel)
    overrides: dict[str, Any] = {"calculate_per_token_loss": True}
    overrides["sequence_parallel"] = settings.sequence_parallel and parallel.tensor_model_parallel_size > 1
    if settings.recompute_granularity == "full":
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif settings.recompute_granularity == "selective":
        overrides |= {"recompute_granularity": "selective"}
    model = build_model(
        settings.config, parallel, settings.dtype, parallel_output=True, lora=settings.lora, **overrides
    )
    _mark_divided_parameters(model, settings.config, parallel)
    _fill(model, settings, parallel)
    is_cuda = parallel.device.type == "cuda"
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=is_cuda and parallel.data_parallel_size > 1,
            use_distributed_optimizer=is_cuda and settings.optimizer.use_distributed_optimizer,
        ),
        module=model,
    )
    if is_cuda:
        optimizer: TrainingOptimizer = MegatronOptimizer(
            [wrapped], settings.optimizer, settings.dtype, settings.schedule.lr
        )
    else:
        optimizer = CPUOptimizer(wrapped.parameters(), settings.optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    return wrapped, optimizer


def _mark_divided_parameters(model: nn.Module, config: OPTConfig, parallel: ParallelContext) -> None:
    """Say of each parameter how tensor parallelism divides it: the norm of the gradients depends on it, and core
    only does so where it draws the first values itself."""
    stages, stage = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    layers = layers_of_stage(config.num_layers, stages, stage)
    parameters = dict(model.named_parameters())
    for row in stage_parameters(config, layers, first=parallel.is_first_stage, last=parallel.is_last_stage):
        parameter, dim = parameters[row.megatron], row.split.value
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim, parameter.partition_stride = (-1 if dim is None else dim), 1


def _fill(model: nn.Module, settings: TrainingOptions, parallel: ParallelContext) -> None:
    config = settings.config
    if settings.load is None:
        initialize(model, config, parallel, settings.seed, settings.init_std)
    else:
        directory = locate_on_all_ranks(settings.load, parallel, settings.revision)
        on_all_ranks(parallel, lambda: load_weights(model, open_checkpoint(directory), parallel))
    if settings.lora is not None:
        initialize_factors(model, config, parallel, settings.seed)


def seed_dropout(seed: int, parallel: ParallelContext) -> None:
    """Random states for dropout: tensor parallel ranks share the default one and have one of their own (core's rule),
    pipeline stages and data-parallel ranks differ in both."""
    from megatron.core import tensor_parallel

    own = seed + 100 * parallel.pipeline_model_parallel_rank + 10_000 * parallel.data_parallel_rank
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own)


def build_data(
    settings: TrainingOptions, parallel: ParallelContext, say: Callable[[str], None] = print
) -> tuple[SampleDataset, SampleDataset | None]:
    """Training and validation set, large enough for the whole run."""
    options = settings.trainer
    num_train = options.train_iters * options.global_batch_size
    validates = bool(options.eval_interval)
    if settings.supervised is not None:
        sets = on_all_ranks(parallel, lambda: _supervised(settings, num_train, validates))
        for line in [line for dataset in sets if dataset is not None for line in dataset.report()]:
            say(line)
        return _enough_for_validation(sets, parallel)
    per_validation = options.eval_iters * options.micro_batch_size * parallel.data_parallel_size
    sets = build_datasets(
        settings.data,
        parallel,
        num_train_samples=num_train,
        num_valid_samples=(per_validation or None) if validates else 0,
        seq_length=options.seq_length,
        seed=settings.seed,
        vocab_size=settings.config.vocab_size,
        eod=settings.config.eos_token_id,
        pad=settings.config.pad_token_id,
    )
    return _enough_for_validation(sets, parallel)


def _enough_for_validation(
    sets: tuple[SampleDataset, SampleDataset | None], parallel: ParallelContext
) -> tuple[SampleDataset, SampleDataset | None]:
    if sets[1] is not None and len(sets[1]) < parallel.data_parallel_size:
        raise UserError(
            f"the validation data make {len(sets[1])} sequences, fewer than the {parallel.data_parallel_size} "
            "data-parallel ranks: give more, or leave --eval-interval out"
        )
    return sets


def _supervised(
    settings: TrainingOptions, num_train: int, validates: bool
) -> tuple[SampleDataset, SampleDataset | None]:
    from ..data.supervised_dataset import SupervisedDataset

    if settings.tokenizer is None:
        raise UserError(
            "--supervised-data needs a tokenizer: give --tokenizer DIR, or --load a checkpoint that has one"
        )
    tokenizer = _read_tokenizer(settings)
    length, files = settings.trainer.seq_length, settings.supervised
    train_data = SupervisedDataset(files.train, tokenizer, length, settings.seed, num_samples=num_train)
    valid_data = SupervisedDataset(files.valid, tokenizer, length, settings.seed) if validates and files.valid else None
    return train_data, valid_data


def _checkpoints(settings: TrainingOptions, parallel: ParallelContext) -> Checkpoints | None:
    if settings.directory is None:
        return None
    return Checkpoints(
        settings.directory,
        parallel,
        keep=settings.keep_last,
        companions=_companions(settings) if parallel.is_leader else {},
        background=not settings.no_async_save,
    )


def _companions(settings: TrainingOptions) -> dict[str, bytes]:
    dtype = str(settings.dtype).removeprefix("torch.")
    config = settings.config.replace(dtype=dtype).to_hf()
    files = {"config.json": json.dumps(config, indent=2, sort_keys=True).encode()}
    if settings.lora is not None:
        files[LORA_FILE] = json.dumps(asdict(settings.lora), indent=2).encode()
    directory = settings.tokenizer
    if directory is not None and directory.is_file():
        directory = directory.parent
    for name in TOKENIZER_FILES if directory else ():
        path = directory / name
        if path.is_file():
            files[name] = path.read_bytes()
    return files


def _resume(
    settings: TrainingOptions,
    model: nn.Module,
    optimizer: TrainingOptimizer,
    checkpoints: Checkpoints | None,
    parallel: ParallelContext,
    say: Callable[[str], None],
) -> TrainingState:
    run = _identity(settings)
    if checkpoints:
        checkpoints.remove_unfinished()
    path = newest_whole(settings.directory, parallel, say) if checkpoints else None
    if path is None:
        number = parallel.broadcast_object(len(saved_checkpoints(settings.directory)) if checkpoints else 0)
        if number:
            raise UserError(
                f"--save {settings.directory}: none of its {number} checkpoints is whole; move them away to begin anew"
            )
        return TrainingState(run=run)
    state, same_layout = checkpoints.read_state(path)
    _compare(state.run or {}, run, path)
    checkpoints.load(path, model.module, optimizer, same_layout=same_layout)
    if not same_layout:  # whose random states cannot be taken: others than the first steps had
        seed_dropout(settings.seed + state.iteration, parallel)
    say(f"resumed from {path}: iteration {state.iteration}, {state.consumed_samples} sequences")
    state.run = run
    return state


def _identity(settings: TrainingOptions) -> dict[str, Any]:
    """What must be the same when a run is resumed: the model, and what the order of the data depends on."""
    options = settings.trainer
    model = settings.config.to_hf()
    return {
        "config": {name: model[name] for name in sorted(model) if name not in ("dtype", "torch_dtype")},
        "lora": asdict(settings.lora) if settings.lora else None,
        "dtype": str(settings.dtype),
        "seed": settings.seed,
        "seq_length": options.seq_length,
        "global_batch_size": options.global_batch_size,
        "train_iters": options.train_iters,
        "data": _data_identity(settings),
    }


def _data_identity(settings: TrainingOptions) -> list[Any]:
    """The sizes of the files, which may have been moved, and how they are mixed."""
    if settings.supervised is not None:
        return [Path(name).stat().st_size for name in settings.supervised.train]
    words = settings.data.train_data_path or settings.data.data_path
    files = [Path(f"{word}.bin") for word in words]
    sizes = [file.stat().st_size if file.is_file() else word for file, word in zip(files, words, strict=True)]
    return [*sizes, settings.data.split if settings.data.data_path else ""]


def _compare(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
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
