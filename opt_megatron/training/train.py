"""Sets up a run (data, model, optimizer, checkpoints) and runs its training loop.

A run starts from scratch (a config and OPT's initialisation), from the weights of a checkpoint (fine-tuning), or
from where it stopped, if its directory holds an intact checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from ..checkpoint.manifest import comparable_config
from ..data.dataloader import num_micro_batches
from ..errors import UserError
from ..options import options_of
from ..parallel.agreement import check_same_on_all_ranks
from ..parallel.context import ParallelContext, on_all_ranks
from ..parallel.core_compat import prepare_training
from .data_setup import read_tokenizer, setup_data
from .header import header_lines
from .metrics import MetricsLogger
from .mezo.setup import setup_mezo_trainer
from .model_setup import setup_model_and_optimizer
from .options import ExecutionOptions
from .resume import make_checkpoint_manager, resume
from .run_directory import RunDirectory
from .run_file import write_run_file
from .signals import SignalFlag
from .trainer import Trainer
from .training_loop import TrainingLoop
from .training_options import TrainingOptions


def train(options: TrainingOptions, parallel: ParallelContext, print_line: Callable[[str], None] = print) -> bool:
    """Train; returns whether the last iteration was reached (False after a SIGTERM). Collective.

    Args:
        print_line: called on the leader with lines for the user while the run is set up.

    Raises:
        UserError: on every rank.
    """
    prepare_training(parallel.device)
    _check(options, parallel)
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(SignalFlag(signal.SIGTERM))
        if options.directory is not None:
            directory = RunDirectory(options.directory)
            on_all_ranks(parallel, lambda: stack.enter_context(directory) if parallel.is_leader else None)
        return _setup_loop(options, parallel, print_line, terminated, stack).run()


def _setup_loop(
    options: TrainingOptions,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
    terminated: SignalFlag,
    stack: contextlib.ExitStack,
) -> TrainingLoop:
    print_on_leader = print_line if parallel.is_leader else lambda text: None

    def open_metrics(iteration: int) -> MetricsLogger | None:
        return on_all_ranks(parallel, lambda: _open_metrics(options, iteration, stack) if parallel.is_leader else None)

    setup = _setup_trainer if options.mezo is None else setup_mezo_trainer
    return setup(options, parallel, print_on_leader, open_metrics, terminated)


def _setup_trainer(
    options: TrainingOptions,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
    open_metrics: Callable[[int], MetricsLogger | None],
    terminated: SignalFlag,
) -> Trainer:
    header: list[str] = []
    train_data, valid_data = setup_data(options, parallel, header.append)
    model, optimizer = setup_model_and_optimizer(options, parallel)
    checkpoints = make_checkpoint_manager(options, parallel)
    state = resume(options, model, optimizer, checkpoints, parallel, print_line)
    for line in [*header, *header_lines(options, parallel, model)]:
        print_line(line)
    return Trainer(
        model,
        options.config,
        optimizer,
        options.schedule,
        parallel,
        options.trainer,
        train_data,
        valid_data,
        checkpoints,
        state,
        open_metrics(state.iteration),
        terminated,
    )


def _open_metrics(options: TrainingOptions, iteration: int, stack: contextlib.ExitStack) -> MetricsLogger:
    """The logger, which `stack` closes; run.yaml is written at the same time."""
    tensorboard = None if options.tensorboard_dir is None else Path(options.tensorboard_dir)
    metrics = MetricsLogger(options.directory, tensorboard, iteration)
    stack.callback(metrics.close)
    if options.directory is not None and options.run_file:
        write_run_file(options.directory, options.run_file)
    return metrics


def _check(options: TrainingOptions, parallel: ParallelContext) -> None:
    """Raise UserError if options contradict each other or the layout, before anything is built."""
    trainer, config = options.trainer, options.config
    num_micro_batches(trainer.global_batch_size, trainer.micro_batch_size, parallel.data_parallel_size)
    if trainer.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq-length {trainer.seq_length} is more than the model's {config.max_position_embeddings} positions"
        )
    if options.sequence_parallel and trainer.seq_length % parallel.tensor_model_parallel_size:
        raise UserError(
            f"--sequence-parallel divides the sequence among the tensor parallel ranks: --seq-length "
            f"{trainer.seq_length} is no multiple of {parallel.tensor_model_parallel_size}"
        )
    if options.optimizer.overlap_param_gather and not options.optimizer.use_distributed_optimizer:
        raise UserError(
            "--overlap-param-gather is given without --use-distributed-optimizer, whose parameters it gathers"
        )
    if options.cross_entropy_loss_fusion and options.dtype != torch.bfloat16:
        raise UserError("--cross-entropy-loss-fusion rounds the gradients of the logits to bfloat16: give --bf16 too")
    if (options.data is None) == (options.supervised is None):
        raise UserError("give --data-path (or --train-data-path), or --supervised-data, and not both")
    check_same_on_all_ranks(parallel.control_group, _comparable(options))
    on_all_ranks(parallel, lambda: (read_tokenizer(options), options.lora_layers))
    if options.transformer_impl == "transformer_engine":
        on_all_ranks(parallel, lambda: _check_transformer_engine(options, parallel))


def _check_transformer_engine(options: TrainingOptions, parallel: ParallelContext) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    reasons = {
        "computes on a GPU alone, and this run is on a CPU": parallel.device.type == "cpu",
        "normalises before attention and MLP, and this model after them": not options.config.do_layer_norm_before,
        "has no layers with LoRA": bool(options.lora_layers),
        "does not keep packed examples apart (--supervised-data)": options.supervised is not None,
        "needs NVIDIA's TransformerEngine, which is not installed (transformer-engine[pytorch])": not HAVE_TE,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"--transformer-impl transformer_engine {reason}: use --transformer-impl local")


def _comparable(options: TrainingOptions) -> dict[str, object]:
    """What must be the same on all ranks, by name; files are compared when they are read."""
    declared = (options.schedule, options.trainer, options.optimizer, options.lora, options.mezo)
    values = {name: value for part in declared if part is not None for name, value in vars(part).items()}
    return (
        comparable_config(options.config)
        | values
        | {name: getattr(options, name) for name in ("dtype", "init_std", *options_of(ExecutionOptions))}
    )
