"""megatron-core's optimizer, distributed or not, for training on CUDA.

Without Apex and TransformerEngine core takes torch's AdamW, not fused, and reads the norm of each parameter's gradient
by itself. Here AdamW is fused, and the norm of all gradients is read once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from .optimizer import OptimizerStep, TrainingOptimizer
from .options import OptimizerOptions


class MegatronOptimizer(TrainingOptimizer):
    """Adam of megatron-core.

    Args:
        chunks: the model's parts on this rank, each in DistributedDataParallel.
        dtype: of the parameters.
        lr: the peak learning rate, for core's own check.
    """

    def __init__(self, chunks: list[nn.Module], options: OptimizerOptions, dtype: torch.dtype, lr: float) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self._options = options
        self._scales_loss = dtype == torch.float16
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
                overlap_param_gather=options.overlap_param_gather,
            ),
            chunks,
        )
        self._fuse_torch_adam()

    def _fuse_torch_adam(self) -> None:
        """Let torch's AdamW update all parameters in one kernel; core's choice where there is Apex or TransformerEngine
        is fused already. The number of the step is then on the parameters' device."""
        for optimizer in self._core_optimizers():
            adam = optimizer.optimizer
            if isinstance(adam, torch.optim.AdamW):
                for group in adam.param_groups:
                    group["fused"] = True
                for parameter, state in adam.state.items():
                    if "step" in state:
                        state["step"] = state["step"].to(parameter.device)

    def step(self, lr: float) -> OptimizerStep:
        """Update the parameters, or skip the step: core skips overflows of fp16, this method all other bad norms."""
        scale = float(self._optimizer.get_loss_scale()) if self._scales_loss else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        if self._optimizer.prepare_grads():  # an overflow, after which core has updated its loss scale
            return OptimizerStep(math.inf, False, scale, scale > self._options.min_loss_scale)
        norm = self._grad_norm()
        if not math.isfinite(norm) or 0 < self._options.skip_grad_norm < norm:
            return OptimizerStep(norm, False, scale)
        self._clip(norm)
        self._optimizer.step_with_ready_grads()
        return OptimizerStep(norm, True, scale)

    @torch.no_grad()
    def _grad_norm(self) -> float:
        """The norm of all gradients over the ranks, each counted once."""
        grads = [grad for optimizer in self._core_optimizers() for grad in optimizer.get_main_grads_for_grad_norm()]
        norm = get_total_norm(grads) if grads else torch.zeros((), device="cuda")  # a stage may have no LoRA
        square = norm.double() ** 2
        dist.all_reduce(square, group=self._optimizer.get_grad_stats_parallel_group())
        return math.sqrt(square.item())

    @torch.no_grad()
    def _clip(self, norm: float) -> None:
        factor = self._options.clip_grad / (norm + 1e-6)  # as core's clip_grad_by_total_norm_fp32
        parameters = [p for optimizer in self._core_optimizers() for p in optimizer.get_parameters()]
        if 0 < factor < 1:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times core's loss scale; any shape."""
        return self._optimizer.scale_loss(loss)

    def zero_grad(self) -> None:
        """Clear the parameters' own gradients."""
        self._optimizer.zero_grad()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Core's state, in the form that can be read at another layout."""
        if is_loading and self._options.use_distributed_optimizer:
            for optimizer in self._core_optimizers():
                _prepare_torch_adam(optimizer)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        return self._optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore core's state."""
        self._optimizer.load_state_dict(state)
        self._fuse_torch_adam()  # a run that was saved before it was fused

    def _core_optimizers(self) -> list[Any]:
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])


def _prepare_torch_adam(optimizer: Any) -> None:
    """Let core's distributed optimizer be restored around torch's Adam, its choice without Apex and TransformerEngine.

    core 0.16.1 reads the number of the step from each parameter's state: a new Adam has no state yet, and the states
    that core restores have no step in them.
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if HAVE_APEX_OR_TE:
        return
    if not optimizer.optimizer.state:
        optimizer._init_optimizer_states_with_dummy_values()
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_states_and_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        set_states(model_param, {"step": optimizer.optimizer.state[main_param]["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = set_states_and_step
