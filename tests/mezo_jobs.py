"""Jobs that ranks run for the tests of MeZO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from training_jobs import settings_for, start

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.mezo.steps import MezoStep
from opt_megatron.checkpoint.storage.blocks import block_shape
from opt_megatron.data.prompt_dataset import PromptExample
from opt_megatron.parallel.context import ParallelContext
from opt_megatron.training.mezo.objective import Objective, ObjectiveSum
from opt_megatron.training.mezo.perturbation import Perturbation
from opt_megatron.training.mezo.setup import build_mezo_model, setup_mezo_trainer
from opt_megatron.training.options import MezoOptions
from opt_megatron.training.train import train
from opt_megatron.training.training_options import TrainingOptions


def examples(count: int = 8, answers: int = 1) -> list[PromptExample]:
    """Random ones of unequal lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 500, (size,), generator=generator).tolist())

    return [
        PromptExample((2, *ids(3 + number)), tuple(ids(1 + (number + part) % 3) for part in range(answers)), number % 2)
        for number in range(count)
    ]


def _own(parallel: ParallelContext, batch: list[PromptExample]) -> list[PromptExample]:
    return batch[parallel.data_parallel_rank :: parallel.data_parallel_size]


def _whole(parallel: ParallelContext, perturbation: Perturbation) -> dict[str, torch.Tensor]:
    """The trained tensors of all ranks; those that several ranks hold must be the same."""
    mine = [(name, block, view.reshape(block_shape(block)).cpu().clone()) for name, view, block in perturbation._parts]
    whole: dict[str, torch.Tensor] = {}
    for parts in parallel.gather_objects(mine):
        for name, block, values in parts:
            size = [part.stop for part in block]
            known = whole.get(name, torch.full(size, torch.nan))
            grown = torch.full([max(pair) for pair in zip(size, known.shape, strict=True)], torch.nan)
            grown[tuple(slice(0, length) for length in known.shape)] = known
            before = grown[block]
            assert torch.equal(before.nan_to_num(), values.where(~before.isnan(), 0)), name
            grown[block] = values
            whole[name] = grown
    return whole


def one_step(
    directory: Path, tp: int, pp: int, changes: dict[str, Any], step: MezoStep, kind: str, answers: int
) -> tuple[dict[str, torch.Tensor], list[ObjectiveSum]]:
    """The trained tensors after this step, and the objective at t + e z and t - e z on the way."""
    parallel = start(tp, pp)
    settings = settings_for(directory, **changes)
    model = build_mezo_model(settings, open_checkpoint(directory), parallel)
    perturbation, objective = Perturbation(model, parallel, 1e-3), Objective(kind, model, parallel, 3)
    batch = _own(parallel, examples(answers=answers))
    perturbation.forward(step.seed)
    sums = [objective(batch)]
    perturbation.backward(step.seed)
    sums.append(objective(batch))
    perturbation.finish(step)
    return _whole(parallel, perturbation), sums


def run_steps(settings: TrainingOptions, tp: int, pp: int) -> tuple[list[MezoStep], dict[str, torch.Tensor], list[str]]:
    """A run's steps, the trained tensors at its end, and what the leader said while it was set up."""
    parallel = start(tp, pp)
    said: list[str] = []
    seen: dict[str, Any] = {}

    def setup(*args: Any) -> Any:
        seen["trainer"] = setup_mezo_trainer(*args)
        return seen["trainer"]

    with mock.patch("opt_megatron.training.train.setup_mezo_trainer", setup):
        train(settings, parallel, said.append)
    trainer = seen["trainer"]
    return trainer._steps, _whole(parallel, trainer._perturbation), said


def mezo_settings(directory: Path, pairs: Path, iterations: int, save: Path | None = None, **changes: Any) -> Any:
    """Settings of a run on `pairs` with batches of 8."""
    from opt_megatron.data.options import SupervisedOptions
    from opt_megatron.training.lr_schedule import LRSchedule

    lr = changes.pop("lr", 1e-5)
    settings = settings_for(
        directory,
        iterations,
        supervised=SupervisedOptions((str(pairs),)),
        mezo=MezoOptions(changes.pop("mezo_epsilon", 1e-3), changes.pop("objective", "nll")),
        schedule=LRSchedule(lr, lr, 0, iterations, "constant"),
        tokenizer=directory,
        base_model=str(directory),
        save=None if save is None else str(save),
        **changes,
    )
    trainer = replace(settings.trainer, seq_length=256, **{"log_interval": 1000})
    return replace(settings, trainer=trainer)


def losses_of_run(settings: TrainingOptions) -> list[float]:
    """The losses of a run's steps on one process."""
    from opt_megatron.training.mezo.mezo_trainer import MezoTrainer

    losses: list[float] = []
    reduce_report = MezoTrainer._all_reduce_report

    def watched(self: MezoTrainer, contribution: torch.Tensor) -> Any:
        report = reduce_report(self, contribution)
        losses.append(report.loss)
        return report

    with mock.patch.object(MezoTrainer, "_all_reduce_report", watched):
        train(settings, start(1, 1), lambda text: None)
    return losses
