"""Training with gradients: forward and backward passes through Megatron-core's schedules, and an optimizer.

A step whose gradients are not all finite, or whose norm is above --skip-grad-norm, does not change the parameters and
is counted as skipped; fp16 also halves its loss scale.
"""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from ..config import OPTConfig
from ..data.dataloader import BatchLoader, MicroBatch, SampleDataset
from ..parallel.context import ParallelContext
from .checkpointing.manager import CheckpointManager
from .checkpointing.run_checkpoints import TrainingState
from .loss import forward_backward
from .lr_schedule import LRSchedule
from .metrics import MetricsLogger, flops_per_token, perplexity_of
from .optimizer import OptimizerStep, TrainingOptimizer
from .options import TrainerOptions
from .signals import SignalFlag
from .training_loop import LogWindow, TrainingLoop
from .validation import validation_loss


class Trainer(TrainingLoop[list[MicroBatch]]):
    """Trains a model.

    Args:
        model: in megatron-core's DistributedDataParallel.
        checkpoints, state, metrics, terminated: as for `TrainingLoop`.
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
        super().__init__(schedule, parallel, options, checkpoints, state, metrics, terminated)
        self._model, self._config, self._optimizer = model, config, optimizer
        self._checkpoints, self._train_data, self._valid_data = checkpoints, train_data, valid_data

    def _open_batches(self) -> BatchLoader:
        self._model.train()
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

    def _compute_step(self, batch: list[MicroBatch], lr: float) -> tuple[Tensor, OptimizerStep]:
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_sum = forward_backward(self._model, batch, self._parallel.device)
        update = self._optimizer.step(lr)
        return loss_sum.contribution(self._parallel), update  # after the step: it may wait for a GPU

    def _step_values(self, update: OptimizerStep, window: LogWindow) -> dict[str, float]:
        flops = flops_per_token(self._config, self._options.seq_length) * window.tokens / window.seconds
        return {
            "perplexity": perplexity_of(window.loss),
            "grad_norm": update.grad_norm,
            "loss_scale": update.loss_scale,
            "tflops_per_rank": flops / 1e12 / self._parallel.world_size,
        }

    def _compute_validation(self) -> dict[str, float] | None:
        if self._valid_data is None:
            return None
        loss, tokens = validation_loss(
            self._model,
            self._valid_data,
            self._parallel,
            self._options.micro_batch_size,
            self._options.num_eval_samples,
        )
        return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": tokens}

    def _start_saving(self) -> None:
        assert self._checkpoints is not None
        if self._model.ddp_config.overlap_param_gather:  # the last step's are gathered in the next forward pass
            self._model.start_param_sync(force_sync=True)
        self._checkpoints.save(self._model.module, self._optimizer, self._state)
