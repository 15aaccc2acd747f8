"""Dynamic loss scaling of fp16 training on a CPU; on CUDA Megatron-core's optimizer has its own."""

from __future__ import annotations

from .options import OptimizerOptions


class LossScale:
    """The factor that fp16's loss is multiplied with; 1 for other dtypes.

    It is halved after an overflow, and doubled after `loss_scale_window` steps without one.
    """

    def __init__(self, options: OptimizerOptions, is_used: bool) -> None:
        self._options, self._is_used = options, is_used
        self.value = options.initial_loss_scale if is_used else 1.0
        self._good_steps = 0

    def update(self, overflowed: bool) -> bool:
        """Adapt the scale after a step; returns whether it has been reduced."""
        if not self._is_used:
            return False
        former = self.value
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, self._options.min_loss_scale)
        elif self._good_steps == self._options.loss_scale_window:
            self.value, self._good_steps = self.value * 2, 0
        return self.value < former

    def state_dict(self) -> dict[str, float]:
        """Values for a checkpoint."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the values of `state_dict`."""
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
