"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UserError

DECAY_STYLES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up to `lr`, then decay to `min_lr` at the last step (linear in OPT's recipe).

    Raises:
        UserError: the numbers contradict each other.
    """

    lr: float
    min_lr: float
    warmup_iters: int
    decay_iters: int
    style: str = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0 and 0 <= self.min_lr <= self.lr):
            raise UserError(f"--lr {self.lr} and --min-lr {self.min_lr}: they must be positive, the second not larger")
        if not 0 <= self.warmup_iters <= self.decay_iters:
            raise UserError(f"--lr-warmup-iters {self.warmup_iters} is not from 0 to the {self.decay_iters} steps")
        if self.style not in DECAY_STYLES:
            raise UserError(f"--lr-decay-style {self.style!r}: choose from {', '.join(DECAY_STYLES)}")

    def at(self, iteration: int) -> float:
        """The learning rate of step `iteration`, the first being 1."""
        if iteration <= self.warmup_iters:
            return self.lr * iteration / self.warmup_iters
        if self.style == "constant":
            return self.lr
        span = max(1, self.decay_iters - self.warmup_iters)
        left = 1 - min(1.0, (iteration - self.warmup_iters) / span)
        if self.style == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.min_lr + (self.lr - self.min_lr) * left
