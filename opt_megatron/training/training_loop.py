"""The loop of training: steps, validation, checkpoints, and how a run ends. What a step computes is the subclasses'.

`max_skipped_iters` steps in a row that do not change the parameters (of fp16: at the smallest loss scale) end the run
with an error, because parameters saved from then on would be useless.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..parallel.context import ParallelContext
from .checkpointing.run_checkpoints import TrainingState
from .lr_schedule import LRSchedule
from .metrics import MetricsLogger, training_line, validation_line
from .optimizer import OptimizerStep
from .options import TrainerOptions
from .signals import SignalFlag

Batch = TypeVar("Batch")
BatchOut = TypeVar("BatchOut", covariant=True)


class Batches(Protocol[BatchOut]):
    """This rank's shares of the global batches, in a context manager that ends their reading."""

    @property
    def consumed_samples(self) -> int:
        """Number of samples in the global batches returned so far."""

    def __next__(self) -> BatchOut:
        """The next one."""

    def __enter__(self) -> Batches[BatchOut]: ...

    def __exit__(self, *error: object) -> object: ...


class RunCheckpointing(Protocol):
    """What the loop asks of the writer of a run's checkpoints (`checkpointing/`), besides saving."""

    directory: Path

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint has been started and not been finished."""

    @property
    def is_ready_here(self) -> bool:
        """Whether this rank has nothing left to write."""

    def finish(self) -> int | None:
        """Publish the checkpoint that is being written, and return its iteration. Collective."""


@dataclass(frozen=True)
class StepReport:
    """What all ranks know of a step."""

    loss: float
    tokens: int
    stop: bool  # some rank has received the signal
    all_ready: bool  # no rank is still writing its files of a checkpoint


class TrainingLoop(ABC, Generic[Batch]):
    """Runs the steps of a run.

    Args:
        checkpoints: None saves nothing.
        state: the progress of the run; updated by every step.
        metrics: on the leader.
        terminated: becomes true when a signal asks the run to stop.
    """

    def __init__(
        self,
        schedule: LRSchedule,
        parallel: ParallelContext,
        options: TrainerOptions,
        checkpoints: RunCheckpointing | None,
        state: TrainingState,
        metrics: MetricsLogger | None,
        terminated: SignalFlag | None = None,
    ) -> None:
        self._schedule, self._parallel, self._options = schedule, parallel, options
        self._writer, self._state = checkpoints, state
        self._metrics, self._terminated = metrics, terminated
        self._skipped_in_a_row = 0
        self._window = LogWindow()

    @abstractmethod
    def _open_batches(self) -> Batches[Batch]:
        """The batches from the state's position on."""

    @abstractmethod
    def _compute_step(self, batch: Batch, lr: float) -> tuple[Tensor, OptimizerStep]:
        """Make a step; returns [loss, tokens] to sum over all ranks, and what the optimizer did. Collective."""

    @abstractmethod
    def _compute_validation(self) -> dict[str, float] | None:
        """The `loss` and other numbers on the validation data; None if there are none. Collective."""

    @abstractmethod
    def _step_values(self, update: OptimizerStep, window: LogWindow) -> dict[str, float]:
        """What the log shows of the steps besides the loss, the learning rate and the speed."""

    @abstractmethod
    def _start_saving(self) -> None:
        """Start to write a checkpoint. Collective."""

    def run(self) -> bool:
        """Train to the last iteration or until a signal; returns whether the last iteration was reached. Collective.

        Raises:
            UserError: on every rank; the run diverged, or a checkpoint could not be written.
        """
        last = self._options.train_iters
        if self._is_over():
            self._print_line(f"nothing to do: {self._state.iteration} of {last} iterations have been made")
            return self._state.iteration >= last
        saved = -1
        with self._open_batches() as batches:
            while not self._is_over():
                report = self._train_step(batches)
                if self._writer and self._writer.is_writing and report.all_ready:
                    self._finish_saving()
                if self._is_due(self._options.eval_interval) or self._state.iteration == last:
                    self._validate()
                stop = report.stop or self._is_over()
                if stop or self._is_due(self._options.save_interval):
                    self._save()
                    saved = self._state.iteration
                if stop:
                    break
        self._finish_saving()
        finished = self._state.iteration >= last
        if not finished:
            what = f"saved iteration {saved}" if self._writer else "nothing is saved without --save"
            self._print_line(f"stopped after iteration {self._state.iteration} of {last}: {what}")
        return finished

    def _is_over(self) -> bool:
        done, exit_iters = self._state.iteration, self._options.exit_iters
        return done >= self._options.train_iters or 0 < exit_iters <= done

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self._state.iteration % interval == 0

    def _train_step(self, batches: Batches[Batch]) -> StepReport:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        lr = self._schedule.at(self._state.iteration + 1)
        contribution, update = self._compute_step(batch, lr)
        report = self._all_reduce_report(contribution)
        self._state.iteration += 1
        self._state.consumed_samples = batches.consumed_samples
        self._window.add(report.loss, report.tokens, time.perf_counter() - began, waited)
        self._count_skipped(update, report)
        if self._is_due(self._options.log_interval) or self._is_over():
            self._log(lr, update)
        return report

    def _all_reduce_report(self, contribution: Tensor) -> StepReport:
        # Any rank may have received the signal or still be writing.
        is_busy = self._writer is not None and not self._writer.is_ready_here
        flags = torch.tensor([bool(self._terminated), is_busy], dtype=torch.float64)
        values = torch.cat([contribution, flags])
        dist.all_reduce(values, group=self._parallel.control_group)
        total, tokens, stopped, busy = values.tolist()
        return StepReport(total / tokens if tokens else 0.0, int(tokens), stopped > 0, busy == 0)

    def _count_skipped(self, update: OptimizerStep, report: StepReport) -> None:
        if update.applied:
            self._skipped_in_a_row = 0
            return
        self._state.skipped += 1
        numbers = f"loss {report.loss:.4g}, gradient norm {update.grad_norm:.4g}"
        scale = f", loss scale {update.loss_scale:g}" if update.loss_scale != 1 else ""
        self._print_line(f"iteration {self._state.iteration}: skipped ({numbers}{scale})")
        if not update.reduced_loss_scale:
            self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._options.max_skipped_iters:
            self._finish_saving()  # the checkpoint of an earlier step
            raise UserError(
                f"the run has diverged: {self._skipped_in_a_row} iterations in a row were skipped, the last being "
                f"{self._state.iteration} ({numbers}); go on from an earlier checkpoint with a smaller --lr"
            )

    def _log(self, lr: float, update: OptimizerStep) -> None:
        window, self._window = self._window, LogWindow()
        values = {
            "loss": window.loss,
            "lr": lr,
            **self._step_values(update, window),
            "tokens_per_second": window.tokens / window.seconds,
            "seconds_per_iteration": window.seconds / window.steps,
            "share_of_time_for_data": window.waited / window.seconds,
            "consumed_samples": self._state.consumed_samples,
            "skipped": self._state.skipped,
        }
        if self._metrics:
            seconds_left = (self._options.train_iters - self._state.iteration) * window.seconds / window.steps
            self._print_line(training_line(self._state.iteration, self._options.train_iters, values, seconds_left))
            self._metrics.record("train", self._state.iteration, values)

    def _validate(self) -> None:
        values = self._compute_validation()
        if values is not None and self._metrics:
            self._print_line(validation_line(self._state.iteration, values))
            self._metrics.record("valid", self._state.iteration, values)

    def _save(self) -> None:
        if self._writer:
            self._finish_saving()
            self._start_saving()

    def _finish_saving(self) -> None:
        if self._writer:
            written = self._writer.finish()
            if written is not None:
                self._print_line(f"iteration {written}: saved to {self._writer.directory}")

    def _print_line(self, text: str) -> None:
        if self._metrics:
            self._metrics.print_line(text)


class LogWindow:
    """Sums over the steps since the last progress line."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self._loss_sum = 0.0

    def add(self, loss: float, tokens: int, seconds: float, waited: float) -> None:
        """Add one step; `waited` are the seconds until its data was there."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited
        self._loss_sum += loss

    @property
    def loss(self) -> float:
        """Mean over the steps."""
        return self._loss_sum / self.steps
