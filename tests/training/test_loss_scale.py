"""The loss scale of fp16 is reduced after overflows, down to its minimum."""

from __future__ import annotations

from opt_megatron.training.loss_scale import LossScale
from opt_megatron.training.options import OptimizerOptions


def test_the_loss_scale_has_a_bottom() -> None:
    scale = LossScale(OptimizerOptions(initial_loss_scale=1.0, min_loss_scale=0.25), is_used=True)
    assert [scale.update(overflowed=True) for _ in range(4)] == [True, True, False, False]
    assert scale.value == 0.25
