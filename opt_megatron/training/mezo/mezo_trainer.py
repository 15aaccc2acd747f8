"""The steps of MeZO in the loop of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint.mezo.normal_numbers import seed_of_step
from ...checkpoint.mezo.steps import MezoStep
from ...data.prompt_dataset import PromptDataset, PromptExample
from ...parallel.context import ParallelContext
from ..checkpointing.mezo_checkpoints import MezoCheckpoints
from ..checkpointing.run_checkpoints import TrainingState
from ..lr_schedule import LRSchedule
from ..metrics import MetricsLogger, perplexity_of
from ..optimizer import OptimizerStep
from ..options import MezoOptions, TrainerOptions
from ..signals import SignalFlag
from ..training_loop import LogWindow, TrainingLoop
from .objective import Objective, ObjectiveSum
from .perturbation import Perturbation


class ExampleBatches:
    """This data parallel replica's shares of the global batches: every n-th example of each."""

    def __init__(self, data: PromptDataset, batch_size: int, parallel: ParallelContext, consumed_samples: int) -> None:
        self._data, self._batch_size, self._parallel = data, batch_size, parallel
        self.consumed_samples = consumed_samples

    def __next__(self) -> list[PromptExample]:
        first, rank, ranks = self.consumed_samples, self._parallel.data_parallel_rank, self._parallel.data_parallel_size
        self.consumed_samples += self._batch_size
        return [self._data[index] for index in range(first + rank, self.consumed_samples, ranks)]

    def __enter__(self) -> ExampleBatches:
        return self

    def __exit__(self, *error: object) -> None:
        pass  # nothing is read ahead


class MezoTrainer(TrainingLoop[list[PromptExample]]):
    """Trains a model by forward passes.

    Args:
        seed: of the run.
        steps: that the parameters have had; every step is added.
        checkpoints, state, metrics, terminated: as for `TrainingLoop`.
    """

    def __init__(
        self,
        objective: Objective,
        perturbation: Perturbation,
        mezo: MezoOptions,
        seed: int,
        schedule: LRSchedule,
        parallel: ParallelContext,
        options: TrainerOptions,
        train_data: PromptDataset,
        valid_data: PromptDataset | None,
        checkpoints: MezoCheckpoints | None,
        state: TrainingState,
        steps: list[MezoStep],
        metrics: MetricsLogger | None,
        terminated: SignalFlag | None = None,
    ) -> None:
        super().__init__(schedule, parallel, options, checkpoints, state, metrics, terminated)
        self._objective, self._perturbation, self._epsilon = objective, perturbation, mezo.mezo_epsilon
        self._seed, self._checkpoints, self._steps = seed, checkpoints, steps
        self._train_data, self._valid_data = train_data, valid_data

    def _open_batches(self) -> ExampleBatches:
        options = self._options
        return ExampleBatches(self._train_data, options.global_batch_size, self._parallel, self._state.consumed_samples)

    def _compute_step(self, batch: list[PromptExample], lr: float) -> tuple[Tensor, OptimizerStep]:
        seed = seed_of_step(self._seed, self._state.iteration + 1)
        self._perturbation.forward(seed)
        plus = self._objective(batch)
        self._perturbation.backward(seed)
        minus = self._objective(batch)
        gradient = (plus.loss - minus.loss) / (2 * self._epsilon)
        is_finite = math.isfinite(gradient)
        self._steps.append(MezoStep(seed, gradient if is_finite else 0.0, lr))
        self._perturbation.finish(self._steps[-1])
        return self._contribution(plus, minus), OptimizerStep(gradient, is_finite, loss_scale=1.0)

    def _contribution(self, plus: ObjectiveSum, minus: ObjectiveSum) -> Tensor:
        """[loss, tokens] of one rank: all ranks have the sums already."""
        if not self._parallel.is_leader:
            return torch.zeros(2, dtype=torch.float64)
        return torch.tensor([(plus.loss + minus.loss) / 2 * plus.tokens, plus.tokens], dtype=torch.float64)

    def _step_values(self, update: OptimizerStep, window: LogWindow) -> dict[str, float]:
        values = {"projected_gradient": update.grad_norm}
        return values if self._objective.is_classification else values | {"perplexity": perplexity_of(window.loss)}

    def _compute_validation(self) -> dict[str, float] | None:
        if self._valid_data is None:
            return None
        count = min(self._options.num_eval_samples or len(self._valid_data), len(self._valid_data))
        rank, ranks = self._parallel.data_parallel_rank, self._parallel.data_parallel_size
        found = self._objective([self._valid_data[index] for index in range(rank, count, ranks)])
        values = {"loss": found.loss, "tokens": found.tokens}
        if self._objective.is_classification:
            return values | {"accuracy": found.accuracy}
        return values | {"perplexity": perplexity_of(found.loss)}

    def _start_saving(self) -> None:
        assert self._checkpoints is not None
        self._checkpoints.save(self._steps, self._state)
