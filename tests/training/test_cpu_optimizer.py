"""The CPU optimizer's rules: clipping, skipping, loss scaling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from opt_megatron.parallel.context import ParallelContext
from opt_megatron.training.cpu_optimizer import CPUOptimizer
from opt_megatron.training.options import OptimizerOptions


def parameters(dtype: torch.dtype, gradient: float) -> list[nn.Parameter]:
    """A matrix and a vector of ones with one gradient in all elements."""
    made = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2, 2), (4,))]
    for parameter in made:
        parameter.main_grad = torch.full(parameter.shape, gradient)
        parameter.tensor_model_parallel = False
    return made


def test_decay_is_for_matrices_and_the_norm_is_clipped(alone: ParallelContext) -> None:
    made = parameters(torch.float32, 10.0)
    outcome = CPUOptimizer(made, OptimizerOptions(weight_decay=0.5)).step(0.1)
    assert outcome.applied
    assert outcome.grad_norm == pytest.approx(10 * math.sqrt(8))
    assert made[0].main_grad.norm() ** 2 + made[1].main_grad.norm() ** 2 == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(made[1], torch.full((4,), 0.9))  # Adam's first step is lr
    torch.testing.assert_close(made[0], torch.full((2, 2), 1 - 0.1 * 0.5 - 0.1))


@pytest.mark.parametrize(("gradient", "limit"), [(float("nan"), 0.0), (float("inf"), 0.0), (10.0, 5.0)])
def test_a_bad_step_changes_nothing(alone: ParallelContext, gradient: float, limit: float) -> None:
    made = parameters(torch.float32, gradient)
    optimizer = CPUOptimizer(made, OptimizerOptions(skip_grad_norm=limit))
    outcome = optimizer.step(0.1)
    assert not outcome.applied
    assert all((parameter == 1).all() for parameter in made)
    for parameter in made:
        parameter.main_grad.fill_(0.1)
    assert optimizer.step(0.1).applied


def test_half_precision_moves_by_less_than_it_can_show(alone: ParallelContext) -> None:
    made = parameters(torch.bfloat16, 1.0)
    optimizer = CPUOptimizer(made, OptimizerOptions(weight_decay=0.0))
    for _ in range(8):  # a bfloat16 step from 1 is 2**-8; eight steps of 1e-3 add up to two
        optimizer.step(1e-3)
        for parameter in made:
            parameter.main_grad.fill_(1.0)
    assert made[0].detach().float().max() == pytest.approx(1 - 8e-3, abs=2**-8)
    assert (made[0] < 1).all()


def test_the_loss_scale_follows_overflows(alone: ParallelContext) -> None:
    made = parameters(torch.float16, float("inf"))
    optimizer = CPUOptimizer(made, OptimizerOptions(loss_scale_window=2))
    assert optimizer.scale_loss(torch.tensor(1.5)) == 6.0
    assert not optimizer.step(0.1).applied
    assert optimizer.scale_loss(torch.tensor(1.0)) == 2.0
    for parameter in made:
        parameter.main_grad.fill_(4.0)
    outcome = optimizer.step(0.1)
    assert outcome.applied
    assert outcome.grad_norm == pytest.approx(2 * math.sqrt(8))  # unscaled
    optimizer.step(0.1)
    assert optimizer.scale_loss(torch.tensor(1.0)) == 4.0
