"""The training loop: steps, validation, checkpoints, and how a run ends.

A step whose gradients are not all finite, or whose norm is above --skip-grad-norm, does not change the parameters and
is counted as skipped; fp16 also halves its loss scale. `max_skipped_iters` such steps in a row (of fp16: at the
smallest scale) end the run with an error, because parameters saved from then on would be useless.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from ..config import OPTConfig
from ..data.dataloader import BatchLoader, SampleDataset
from ..errors import UserError
from ..parallel.context import ParallelContext
from .checkpointing.manager import CheckpointManager, TrainingState
from .loss import LossSum, forward_backward
from .lr_schedule import LRSchedule
from .metrics import MetricsLogger, flops_per_token, perplexity_of, training_line
from .optimizer import OptimizerStep, TrainingOptimizer
from .options import TrainerOptions
from .signals import SignalFlag
from .validation import validation_loss


@dataclass(frozen=True)
class _StepReport:
    """What all ranks know of a step."""

    loss: float
    tokens: int
    stop: bool  # some rank has received the signal
    all_ready: bool  # no rank is still writing its files of a checkpoint


class Trainer:
    """Trains a model.

    Args:
        model: in megatron-core's DistributedDataParallel.
        checkpoints: None saves nothing.
        state: the progress of the run; updated by every step.
        metrics: on the leader.
        terminated: becomes true when a signal asks the run to stop.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        config: OPTConfig,
        optimizer: TrainingOptimizer,
        schedule: LRSchedule,
        parallel: ParallelContext,
        options: TrainerOptions,
        train_data: SampleDataset,
        valid_data: SampleDataset | None,
        checkpoints: CheckpointManager | None,
        state: TrainingState,
        metrics: MetricsLogger | None,
        terminated: SignalFlag | None = None,
    ) -> None:
        self._model, self._config, self._optimizer, self._schedule = model, config, optimizer, schedule
        self._parallel, self._options, self._state, self._metrics = parallel, options, state, metrics
        self._checkpoints, self._train_data, self._valid_data = checkpoints, train_data, valid_data
        self._terminated = terminated
        self._skipped_in_a_row = 0
        self._window = _LogWindow()

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
        with self._batch_loader() as loader:
            self._model.train()
            while not self._is_over():
                report = self._train_step(loader)
                if self._checkpoints and self._checkpoints.is_writing and report.all_ready:
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
            what = f"saved iteration {saved}" if self._checkpoints else "nothing is saved without --save"
            self._print_line(f"stopped after iteration {self._state.iteration} of {last}: {what}")
        return finished

    def _batch_loader(self) -> BatchLoader:
        options, parallel = self._options, self._parallel
        return BatchLoader(
            self._train_data,
            options.global_batch_size,
            options.micro_batch_size,
            parallel.data_parallel_rank,
            parallel.data_parallel_size,
            self._state.consumed_samples,
            pin_memory=parallel.device.type == "cuda",
        )

    def _is_over(self) -> bool:
        done, exit_iters = self._state.iteration, self._options.exit_iters
        return done >= self._options.train_iters or 0 < exit_iters <= done

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self._state.iteration % interval == 0

    def _train_step(self, loader: BatchLoader) -> _StepReport:
        began = time.perf_counter()
        micro_batches = next(loader)
        waited = time.perf_counter() - began
        lr = self._schedule.at(self._state.iteration + 1)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_sum = forward_backward(self._model, micro_batches, self._parallel.device)
        update = self._optimizer.step(lr)
        report = self._all_reduce_report(loss_sum)
        self._state.iteration += 1
        self._state.consumed_samples = loader.consumed_samples
        self._window.add(report.loss, report.tokens, time.perf_counter() - began, waited)
        self._count_skipped(update, report)
        if self._is_due(self._options.log_interval) or self._is_over():
            self._log(lr, update)
        return report

    def _all_reduce_report(self, loss_sum: LossSum) -> _StepReport:
        # Only the last stage has losses, and any rank may have received the signal or still be writing.
        is_busy = self._checkpoints is not None and not self._checkpoints.is_ready_here
        flags = torch.tensor([bool(self._terminated), is_busy], dtype=torch.float64)
        values = torch.cat([loss_sum.contribution(self._parallel), flags])
        dist.all_reduce(values, group=self._parallel.control_group)
        total, tokens, stopped, busy = values.tolist()
        return _StepReport(total / tokens if tokens else 0.0, int(tokens), stopped > 0, busy == 0)

    def _count_skipped(self, update: OptimizerStep, report: _StepReport) -> None:
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
        window, self._window = self._window, _LogWindow()
        per_second = window.tokens / window.seconds
        flops = flops_per_token(self._config, self._options.seq_length) * per_second
        values = {
            "loss": window.loss,
            "perplexity": perplexity_of(window.loss),
            "lr": lr,
            "grad_norm": update.grad_norm,
            "loss_scale": update.loss_scale,
            "tokens_per_second": per_second,
            "tflops_per_rank": flops / 1e12 / self._parallel.world_size,
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
        if self._valid_data is None:
            return
        loss, tokens = validation_loss(
            self._model,
            self._valid_data,
            self._parallel,
            self._options.micro_batch_size,
            self._options.num_eval_samples,
        )
        iteration = self._state.iteration
        self._print_line(f"iteration {iteration}: validation loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}")
        if self._metrics:
            values = {"loss": loss, "perplexity": perplexity_of(loss), "tokens": tokens}
            self._metrics.record("valid", iteration, values)

    def _save(self) -> None:
        if self._checkpoints:
            self._finish_saving()
            if self._model.ddp_config.overlap_param_gather:  # the last step's are gathered in the next forward pass
                self._model.start_param_sync(force_sync=True)
            self._checkpoints.save(self._model.module, self._optimizer, self._state)

    def _finish_saving(self) -> None:
        if self._checkpoints:
            written = self._checkpoints.finish()
            if written is not None:
                self._print_line(f"iteration {written}: saved to {self._checkpoints.directory}")

    def _print_line(self, text: str) -> None:
        if self._metrics:
            self._metrics.print_line(text)


class _LogWindow:
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
