"""The training loop: steps, validation, checkpoints, and how a run ends.

Rules for steps that go wrong: a step whose gradients are not all finite numbers, or whose norm is above
--skip-grad-norm, does not change the parameters and is counted as skipped; fp16 halves its loss scale as well.
`max_skipped_iters` such steps in a row (of fp16: at the smallest scale) end the run with an error, since what
would be saved then is of no use.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import nn

from ..config import OPTConfig
from ..data.dataloader import Batches, SampleDataset
from ..errors import UserError
from ..parallel.context import ParallelContext
from .checkpointing import Checkpoints, TrainingState
from .objective import LossSum, forward_backward
from .optimizer import StepOutcome, TrainingOptimizer
from .options import TrainerOptions
from .progress import Progress, perplexity, training_line
from .schedule import Schedule, flops_per_token


@dataclass(frozen=True)
class _Report:
    """One step, the same on every rank."""

    loss: float
    tokens: int
    stop: bool
    all_ready: bool


class Trainer:
    """Trains a model that core's DistributedDataParallel wraps.

    Args:
        state: where the run stands; changed as it goes on.
        progress: on the leader.
        terminated: true once a signal has asked for an end.
        checkpoints: None saves nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OPTConfig,
        optimizer: TrainingOptimizer,
        schedule: Schedule,
        parallel: ParallelContext,
        options: TrainerOptions,
        train_data: SampleDataset,
        valid_data: SampleDataset | None,
        checkpoints: Checkpoints | None,
        state: TrainingState,
        progress: Progress | None,
        terminated: SignalFlag | None = None,
    ) -> None:
        self._model, self._config, self._optimizer, self._schedule = model, config, optimizer, schedule
        self._parallel, self._options, self._state, self._progress = parallel, options, state, progress
        self._checkpoints, self._train_data, self._valid_data = checkpoints, train_data, valid_data
        self._terminated = terminated
        self._skipped_in_a_row = 0
        self._window = _Window()

    def run(self) -> bool:
        """Train to the end or to a signal; returns whether the end was reached.

        Raises:
            UserError: on every rank; the run diverged, or a checkpoint could not be written.
        """
        last = self._options.train_iters
        if self._is_over():
            self._say(f"nothing to do: {self._state.iteration} of {last} iterations have been made")
            return self._state.iteration >= last
        saved = -1
        with self._batches() as batches:
            self._model.train()
            while not self._is_over():
                report = self._one_step(batches)
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
            where = f"saved iteration {saved}" if self._checkpoints else "nothing is saved without --save"
            self._say(f"stopped after iteration {self._state.iteration} of {last}: {where}")
        return finished

    def _batches(self) -> Batches:
        options, parallel = self._options, self._parallel
        return Batches(
            self._train_data,
            options.global_batch_size,
            options.micro_batch_size,
            parallel.data_parallel_rank,
            parallel.data_parallel_size,
            self._state.consumed_samples,
        )

    def _is_over(self) -> bool:
        done, exit_iters = self._state.iteration, self._options.exit_iters
        return done >= self._options.train_iters or 0 < exit_iters <= done

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self._state.iteration % interval == 0

    def _one_step(self, batches: Batches) -> _Report:
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began
        lr = self._schedule.at(self._state.iteration + 1)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        sums = forward_backward(self._model, micro_batches, self._parallel.device)
        outcome = self._optimizer.step(lr)
        report = self._share(sums)
        self._state.iteration += 1
        self._state.consumed_samples = batches.consumed_samples
        self._window.add(report.loss, report.tokens, time.perf_counter() - began, waited)
        self._count_skipped(outcome, report)
        if self._is_due(self._options.log_interval) or self._is_over():
            self._log(lr, outcome)
        return report

    def _share(self, sums: LossSum) -> _Report:
        """What one rank knows, on all of them: losses are the last stage's, and any rank may have been signalled."""
        ready = self._checkpoints is None or self._checkpoints.is_ready_here
        flags = torch.tensor([bool(self._terminated), not ready], dtype=torch.float64)
        values = torch.cat([_counted(sums, self._parallel), flags])
        dist.all_reduce(values, group=self._parallel.control_group)
        total, tokens, stops, busy = values.tolist()
        return _Report(total / tokens if tokens else 0.0, int(tokens), stops > 0, busy == 0)

    def _count_skipped(self, outcome: StepOutcome, report: _Report) -> None:
        if outcome.applied:
            self._skipped_in_a_row = 0
            return
        self._state.skipped += 1
        told = f"loss {report.loss:.4g}, gradient norm {outcome.grad_norm:.4g}"
        scale = f", loss scale {outcome.loss_scale:g}" if outcome.loss_scale != 1 else ""
        self._say(f"iteration {self._state.iteration}: skipped ({told}{scale})")
        if not outcome.is_scales_fault:
            self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._options.max_skipped_iters:
            self._finish_saving()  # of an earlier step
            raise UserError(
                f"the run has diverged: {self._skipped_in_a_row} iterations in a row were skipped, the last being "
                f"{self._state.iteration} ({told}); go on from an earlier checkpoint with a smaller --lr"
            )

    def _log(self, lr: float, outcome: StepOutcome) -> None:
        window, self._window = self._window, _Window()
        per_second = window.tokens / window.seconds
        flops = flops_per_token(self._config, self._options.seq_length) * per_second
        values = {
            "loss": window.loss,
            "perplexity": perplexity(window.loss),
            "lr": lr,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            "tokens_per_second": per_second,
            "tflops_per_rank": flops / 1e12 / self._parallel.world_size,
            "seconds_per_iteration": window.seconds / window.steps,
            "share_of_time_for_data": window.waited / window.seconds,
            "consumed_samples": self._state.consumed_samples,
            "skipped": self._state.skipped,
        }
        if self._progress:
            left = (self._options.train_iters - self._state.iteration) * window.seconds / window.steps
            self._say(training_line(self._state.iteration, self._options.train_iters, values, left))
            self._progress.record("train", self._state.iteration, values)

    def _validate(self) -> None:
        if self._valid_data is None:
            return
        loss, tokens = validation_loss(
            self._model,
            self._valid_data,
            self._parallel,
            self._options.micro_batch_size,
            self._options.eval_iters,
        )
        iteration = self._state.iteration
        self._say(f"iteration {iteration}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        if self._progress:
            values = {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}
            self._progress.record("valid", iteration, values)

    def _save(self) -> None:
        if self._checkpoints:
            self._finish_saving()
            self._checkpoints.save(self._model.module, self._optimizer, self._state)

    def _finish_saving(self) -> None:
        if self._checkpoints:
            written = self._checkpoints.finish()
            if written is not None:
                self._say(f"iteration {written}: saved to {self._checkpoints.directory}")

    def _say(self, text: str) -> None:
        if self._progress:
            self._progress.say(text)


@torch.no_grad()
def validation_loss(
    model: nn.Module, data: SampleDataset, parallel: ParallelContext, micro_batch_size: int, iterations: int
) -> tuple[float, int]:
    """Mean loss (nats a token) and tokens over the first samples of a data set, without dropout; on every rank.

    Args:
        iterations: micro-batches of each data-parallel rank; 0 takes all whole ones there are.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    ranks = parallel.data_parallel_size
    size = min(micro_batch_size, max(1, len(data) // ranks))
    with Batches(data, size * ranks, size, parallel.data_parallel_rank, ranks) as batches:
        for number, micro_batches in enumerate(batches, 1):
            sums += _counted(forward_backward(model, micro_batches, parallel.device, forward_only=True), parallel)
            if number == iterations:
                break
    dist.all_reduce(sums, group=parallel.control_group)
    model.train(was_training)
    total, tokens = sums.tolist()
    return (total / tokens if tokens else float("nan")), int(tokens)


def _counted(sums: LossSum, parallel: ParallelContext) -> torch.Tensor:
    """[loss, tokens] on the ranks whose sum over all ranks counts every token once, zeros on the others."""
    counted = parallel.is_last_stage and parallel.tensor_model_parallel_rank == 0
    return torch.tensor([float(sums.total), float(sums.tokens)] if counted else [0.0, 0.0], dtype=torch.float64)


class _Window:
    """The steps since the last progress line."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self._sum = 0.0

    def add(self, loss: float, tokens: int, seconds: float, waited: float) -> None:
        """One step."""
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited
        self._sum += loss

    @property
    def loss(self) -> float:
        """Mean over the steps."""
        return self._sum / self.steps


class SignalFlag:
    """True once the signal has come, instead of ending the process. Where handlers cannot be set: never."""

    def __init__(self, number: signal.Signals) -> None:
        self._number, self._came, self._former = number, False, None

    def __enter__(self) -> SignalFlag:
        try:
            self._former = signal.signal(self._number, self._note)
        except ValueError:  # not in the main thread
            self._former = None
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def __bool__(self) -> bool:
        return self._came

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:  # one that came is being obeyed: what else comes changes nothing
            signal.signal(self._number, signal.SIG_IGN if self._came else self._former)
