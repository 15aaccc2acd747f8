"""Sets up a run of MeZO: data, model, the steps that it has had already, and the loop."""

from __future__ import annotations

from collections.abc import Callable

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.checkpoint_facts import facts_digest
from ...checkpoint.load import load_weights, open_on_all_ranks
from ...checkpoint.mezo.run_files import MezoRun
from ...checkpoint.mezo.steps import MezoStep
from ...config import dtype_name
from ...model.opt_model import OPTModel, build_model
from ...parallel.context import ParallelContext, on_all_ranks
from ..checkpointing.mezo_checkpoints import MezoCheckpoints
from ..checkpointing.run_checkpoints import TrainingState
from ..data_setup import setup_prompt_data
from ..header import header_lines
from ..init_weights import init_lora_weights
from ..metrics import MetricsLogger
from ..resume import check_identity, companions_of, find_checkpoint, run_identity
from ..signals import SignalFlag
from ..training_options import TrainingOptions
from .mezo_trainer import MezoTrainer
from .objective import Objective
from .perturbation import Perturbation


def setup_mezo_trainer(
    options: TrainingOptions,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
    open_metrics: Callable[[int], MetricsLogger | None],
    terminated: SignalFlag,
) -> MezoTrainer:
    """The loop of a new run, or of one that goes on from its newest intact checkpoint. Collective.

    Args:
        print_line: called with lines for the user.
        open_metrics: called with the number of steps that have been made.

    Raises:
        UserError: on every rank; data, base or checkpoints cannot be used.
    """
    assert options.mezo is not None and options.load is not None
    header: list[str] = []
    train_data, valid_data = setup_prompt_data(options, parallel, header.append)
    base = open_on_all_ranks(options.load, parallel, options.revision)
    model = build_mezo_model(options, base, parallel)
    perturbation = Perturbation(model, parallel, options.mezo.mezo_epsilon)
    checkpoints = _make_checkpoints(options, base, parallel)
    state, steps = _resume(options, checkpoints, parallel, print_line)
    perturbation.repeat(steps)
    for line in [*header, *header_lines(options, parallel, model)]:
        print_line(line)
    return MezoTrainer(
        Objective(options.mezo.objective, model, parallel, options.trainer.micro_batch_size),
        perturbation,
        options.mezo,
        options.seed,
        options.schedule,
        parallel,
        options.trainer,
        train_data,
        valid_data,
        checkpoints,
        state,
        steps,
        open_metrics(state.iteration),
        terminated,
    )


def build_mezo_model(options: TrainingOptions, base: Checkpoint, parallel: ParallelContext) -> OPTModel:
    """The model with the base's weights and LoRA's first factors, for forward passes without dropout. Collective."""
    model = build_model(options.config, parallel, options.dtype, lora=options.lora_layers)
    on_all_ranks(parallel, lambda: load_weights(model, base, parallel))
    init_lora_weights(model, options.config, parallel, options.seed)
    return model


def _make_checkpoints(options: TrainingOptions, base: Checkpoint, parallel: ParallelContext) -> MezoCheckpoints | None:
    if options.directory is None:
        return None
    assert options.mezo is not None
    digest = on_all_ranks(parallel, lambda: facts_digest(base))
    run = MezoRun(
        base=options.base_model or str(base.path),
        revision=options.revision,
        base_digest=digest,
        dtype=dtype_name(options.dtype),
        epsilon=options.mezo.mezo_epsilon,
        seed=options.seed,
    )
    companions = companions_of(options) if parallel.is_leader else {}
    return MezoCheckpoints(run, options.directory, parallel, keep=options.keep_last, companions=companions)


def _resume(
    options: TrainingOptions,
    checkpoints: MezoCheckpoints | None,
    parallel: ParallelContext,
    print_line: Callable[[str], None],
) -> tuple[TrainingState, list[MezoStep]]:
    """The state and the steps of the newest intact checkpoint; those of a new run if there is none."""
    new_run = TrainingState(run=run_identity(options))
    path = None if checkpoints is None else find_checkpoint(checkpoints, parallel, print_line, is_mezo=True)
    if checkpoints is None or path is None:
        return new_run, []
    state, steps = checkpoints.read(path)
    check_identity(state.run or {}, new_run.run or {}, path)
    print_line(f"resumed from {path}: {state.iteration} iterations are repeated, {state.consumed_samples} examples")
    state.run = new_run.run
    return state, steps
