"""torch's fused AdamW on float32 main parameters, with the gradients of megatron-core's data-parallel buffer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from .loss_scale import LossScale
from .optimizer import OptimizerStep, TrainingOptimizer
from .options import OptimizerOptions


class _BufferedParameter(nn.Parameter):
    """For annotations: a parameter whose gradient DistributedDataParallel keeps in its buffer."""

    main_grad: Tensor


class CPUOptimizer(TrainingOptimizer):
    """AdamW for training on CPUs.

    Args:
        parameters: of a model in DistributedDataParallel; those without gradients are left out.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> None:
        self._options = options
        self._parameters = [cast(_BufferedParameter, p) for p in parameters if p.requires_grad]
        self._main: list[nn.Parameter] = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self._parameters
        ]
        self._scale = LossScale(options, any(p.dtype == torch.float16 for p in self._parameters))
        groups = [
            {"params": [p for p in self._main if has_weight_decay(p)], "weight_decay": options.weight_decay},
            {"params": [p for p in self._main if not has_weight_decay(p)], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": self._main}],
            lr=1.0,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
            fused=True,
        )
        # Parameters that several ranks hold count once in the norm.
        self._is_counted = [
            param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p) for p in self._parameters
        ]

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale; any shape."""
        return loss * self._scale.value

    def zero_grad(self) -> None:
        """Clear the gradients of the parameters; main gradients are rewritten in every step."""
        for parameter in (*self._parameters, *self._main):
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> OptimizerStep:
        """Update the parameters, or skip the step; all ranks make the same decision. Collective."""
        scale = self._scale.value
        grads = [parameter.main_grad.float() for parameter in self._parameters]  # the buffer itself if it is float32
        norm = self._norm(grads) / scale
        overflowed = not math.isfinite(norm)
        too_large = 0 < self._options.skip_grad_norm < norm
        if not overflowed and not too_large:
            self._update_parameters(grads, lr, scale, norm)
        reduced = self._scale.update(overflowed)
        return OptimizerStep(norm, not overflowed and not too_large, scale, reduced)

    def _norm(self, grads: list[Tensor]) -> float:
        squares = [
            grad.norm().double() ** 2 for grad, is_counted in zip(grads, self._is_counted, strict=True) if is_counted
        ]
        total = torch.stack(squares).sum().reshape(1) if squares else torch.zeros(1, dtype=torch.float64)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return math.sqrt(total.item()) if total.item() >= 0 else math.nan

    def _update_parameters(self, grads: list[Tensor], lr: float, scale: float, norm: float) -> None:
        clip = self._options.clip_grad
        factor = min(1.0, clip / (norm + 1e-6)) / scale if clip else 1 / scale
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        for main, grad in zip(self._main, grads, strict=True):
            main.grad = grad
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for parameter, main in zip(self._parameters, self._main, strict=True):
            if parameter is not main:
                parameter.copy_(main)

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Moments and main parameters, sharded as their parameters are; loss scale and number of steps unsharded."""
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        if is_loading and not self._adam.state:
            self._create_moments()
        shards = get_param_id_to_sharded_param_map(model_state, self._parameters)
        tensors: dict[str, dict[int, Any]] = {"exp_avg": {}, "exp_avg_sq": {}, "main": {}}
        for index, (parameter, main) in enumerate(zip(self._parameters, self._main, strict=True)):
            state = self._adam.state[main]
            values = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            if parameter is not main:
                values["main"] = main.detach()
            for kind, value in values.items():
                tensors[kind][index] = make_sharded_optimizer_tensor(shards[index], value, f"optimizer.{kind}")
        return {"tensors": tensors, "step": self._num_steps(), "loss_scale": self._scale.state_dict()}

    def _create_moments(self) -> None:
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
        """Copy the tensors that dist_checkpointing has read into those of AdamW."""
        for index, (parameter, main) in enumerate(zip(self._parameters, self._main, strict=True)):
            moments = self._adam.state[main]
            for kind in ("exp_avg", "exp_avg_sq"):
                moments[kind].copy_(state["tensors"][kind][index])
            moments["step"].fill_(state["step"])
            if parameter is not main:
                main.copy_(state["tensors"]["main"][index])
        self._scale.load_state_dict(state["loss_scale"])


def has_weight_decay(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norms (Megatron-LM's rule)."""
    return parameter.dim() > 1
