"""One small interface to the optimizers: torch's AdamW on a CPU, megatron-core's on CUDA.

    outcome = optimizer.step(lr)        # clips, steps, and says what happened

Both keep float32 main parameters beside half-precision ones, scale the loss of fp16, and take the norm of the
gradients over the model-parallel ranks, every parameter counted once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from .options import OptimizerOptions


@dataclass(frozen=True)
class StepOutcome:
    """What a step did.

    Attributes:
        grad_norm: of the unclipped gradients; not a finite number where they were not.
        applied: the parameters were changed.
        loss_scale: that the gradients had been multiplied with.
        is_scales_fault: not applied because of an overflow of fp16, and the scale has been halved.
    """

    grad_norm: float
    applied: bool
    loss_scale: float
    is_scales_fault: bool = False


class TrainingOptimizer(ABC):
    """What the training loop sees of an optimizer."""

    @abstractmethod
    def step(self, lr: float) -> StepOutcome:
        """Clip the gradients that the backward pass has left, and move the parameters."""

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for the backward pass."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the parameters' own gradients (those in core's buffer are the wrapper's to zero)."""

    @abstractmethod
    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """State for dist_checkpointing, sharded as the model's is."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what dist_checkpointing read for `sharded_state_dict`."""


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norms (Megatron-LM's rule)."""
    return parameter.dim() > 1


class LossScale:
    """Dynamic loss scaling of fp16; for other dtypes 1."""

    def __init__(self, options: OptimizerOptions, is_used: bool) -> None:
        self._options, self._is_used = options, is_used
        self.value = options.initial_loss_scale if is_used else 1.0
        self._good_steps = 0

    def update(self, overflowed: bool) -> bool:
        """After a step; whether it has become smaller."""
        if not self._is_used:
            return False
        former = self.value
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, self._options.min_loss_scale)
        elif self._good_steps == self._options.loss_scale_window:
            self.value, self._good_steps = self.value * 2, 0
        return self.value < former

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self._good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """From one."""
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])


class CPUOptimizer(TrainingOptimizer):
    """torch's fused AdamW on float32 main parameters, with the gradients of core's data-parallel buffer."""

    def __init__(self, parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> None:
        self._options = options
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._main = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self._parameters]
        self._scale = LossScale(options, any(p.dtype == torch.float16 for p in self._parameters))
        groups = [
            {"params": [p for p in self._main if is_decayed(p)], "weight_decay": options.weight_decay},
            {"params": [p for p in self._main if not is_decayed(p)], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": self._main}],
            lr=1.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            fused=True,
        )
        # What each parameter adds to the norm on this rank: parameters that several ranks hold count once.
        self._counted = [param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p) for p in self._parameters]

    def scale_loss(self, loss: Tensor) -> Tensor:
        """[...] -> [...]"""
        return loss * self._scale.value

    def zero_grad(self) -> None:
        """Main gradients are rewritten in every step."""
        for parameter in (*self._parameters, *self._main):
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> StepOutcome:
        """Every rank of the model comes to the same decision."""
        scale = self._scale.value
        for parameter, main in zip(self._parameters, self._main, strict=True):
            main.grad = parameter.main_grad.float()  # the buffer itself where it is float32
        norm = self._norm() / scale
        overflowed = not math.isfinite(norm)
        too_large = 0 < self._options.skip_grad_norm < norm
        if not overflowed and not too_large:
            self._move(lr, scale, norm)
        was_halved = self._scale.update(overflowed)
        return StepOutcome(norm, not overflowed and not too_large, scale, was_halved)

    def _norm(self) -> float:
        squares = [main.grad.norm().double() ** 2 for main, is_counted in self._counted_main() if is_counted]
        total = torch.stack(squares).sum().reshape(1) if squares else torch.zeros(1, dtype=torch.float64)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return math.sqrt(total.item()) if total.item() >= 0 else math.nan

    def _counted_main(self) -> Iterable[tuple[nn.Parameter, bool]]:
        return zip(self._main, self._counted, strict=True)

    def _move(self, lr: float, scale: float, norm: float) -> None:
        clip = self._options.clip_grad
        factor = min(1.0, clip / (norm + 1e-6)) / scale if clip else 1 / scale
        if factor != 1.0:
            torch._foreach_mul_([main.grad for main in self._main], factor)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for parameter, main in zip(self._parameters, self._main, strict=True):
            if parameter is not main:
                parameter.copy_(main)

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Moments and main parameters as shards like their parameters; the scale and the step as they are."""
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        if is_loading and not self._adam.state:
            self._make_empty_moments()
        shards = get_param_id_to_sharded_param_map(model_state, self._parameters)
        tensors: dict[str, dict[int, Any]] = {"exp_avg": {}, "exp_avg_sq": {}, "main": {}}
        for index, (parameter, main) in enumerate(zip(self._parameters, self._main, strict=True)):
            state = self._adam.state[main]
            values = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            if parameter is not main:
                values["main"] = main.detach()
            for kind, value in values.items():
                tensors[kind][index] = make_sharded_optimizer_tensor(shards[index], value, f"optimizer.{kind}")
        return {"tensors": tensors, "step": self._num_steps(), "loss_scale": self._scale.state()}

    def _make_empty_moments(self) -> None:
        for main in self._main:
            self._adam.state[main] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(main),
                "exp_avg_sq": torch.zeros_like(main),
            }

    def _num_steps(self) -> float:
        return next((float(state["step"]) for state in self._adam.state.values()), 0.0)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """dist_checkpointing has given new tensors; they are copied to where AdamW has its own."""
        for index, (parameter, main) in enumerate(zip(self._parameters, self._main, strict=True)):
            mine = self._adam.state[main]
            for kind in ("exp_avg", "exp_avg_sq"):
                mine[kind].copy_(state["tensors"][kind][index])
            mine["step"].fill_(state["step"])
            if parameter is not main:
                main.copy_(state["tensors"]["main"][index])
        self._scale.restore(state["loss_scale"])


class MegatronOptimizer(TrainingOptimizer):
    """megatron-core's optimizer, distributed or not. Written for CUDA, where it has not been run yet."""

    def __init__(self, chunks: list[nn.Module], options: OptimizerOptions, dtype: torch.dtype, lr: float) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self._options = options
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.adam_beta1,
                adam_beta2=options.adam_beta2,
                adam_eps=options.adam_eps,
                clip_grad=options.clip_grad,
                fp16=dtype == torch.float16,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                initial_loss_scale=options.initial_loss_scale,
                loss_scale_window=options.loss_scale_window,
                min_loss_scale=options.min_loss_scale,
                hysteresis=1,
                use_distributed_optimizer=options.use_distributed_optimizer,
            ),
            chunks,
        )

    def step(self, lr: float) -> StepOutcome:
        """Core skips steps whose fp16 gradients overflowed; those whose norm is not finite or too large are skipped
        here."""
        scale = float(self._optimizer.get_loss_scale())
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        if self._optimizer.prepare_grads():  # which has let the scaler know
            return StepOutcome(math.inf, False, scale, scale > self._options.min_loss_scale)
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm) or 0 < self._options.skip_grad_norm < norm:
            return StepOutcome(norm, False, scale)
        self._clip(norm)
        self._optimizer.step_with_ready_grads()
        return StepOutcome(norm, True, scale)

    def _clip(self, norm: float) -> None:
        # As core's `step` does, which would not let a step be skipped between the norm and this.
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            parameters = optimizer.get_parameters()
            if self._options.clip_grad and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=self._options.clip_grad, total_norm=norm)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """[...] -> [...]"""
        return self._optimizer.scale_loss(loss)

    def zero_grad(self) -> None:
        """core's"""
        self._optimizer.zero_grad()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """core's, in the form that can be resharded"""
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        return self._optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """core's"""
        self._optimizer.load_state_dict(state)
