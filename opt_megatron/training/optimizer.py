"""The interface of the optimizers: torch's AdamW on a CPU (cpu_optimizer.py), megatron-core's on CUDA.

    result = optimizer.step(lr)        # clips, steps, and says what happened

Both keep float32 main parameters for half-precision ones, scale the loss of fp16, and take the norm of the
gradients over the model-parallel ranks, each parameter counted once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class OptimizerStep:
    """What an optimizer step did.

    Attributes:
        grad_norm: norm of the gradients before clipping; inf or NaN if they are not finite.
        applied: whether the parameters were changed.
        loss_scale: the factor of fp16's loss in this step.
        reduced_loss_scale: not applied because fp16 overflowed, and the loss scale has been halved.
    """

    grad_norm: float
    applied: bool
    loss_scale: float
    reduced_loss_scale: bool = False


class TrainingOptimizer(ABC):
    """What the training loop and the checkpoints need of an optimizer."""

    @abstractmethod
    def step(self, lr: float) -> OptimizerStep:
        """Clip the gradients of the backward pass and update the parameters, or skip the step. Collective."""

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for the backward pass; any shape."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear the parameters' own gradients (the DistributedDataParallel clears those in its buffer)."""

    @abstractmethod
    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """State for dist_checkpointing, sharded in the same way as the model's."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what dist_checkpointing has read for `sharded_state_dict`."""
