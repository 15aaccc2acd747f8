"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from opt_megatron.errors import UserError
from opt_megatron.training.lr_schedule import LRSchedule


def test_warm_up_and_linear_decay() -> None:
    schedule = LRSchedule(6e-4, 6e-5, 10, 110)
    assert schedule.at(1) == pytest.approx(6e-5)
    assert schedule.at(10) == 6e-4
    assert schedule.at(60) == pytest.approx((6e-4 + 6e-5) / 2)
    assert schedule.at(110) == schedule.at(500) == pytest.approx(6e-5)


def test_other_decays() -> None:
    assert LRSchedule(1.0, 0.0, 0, 100, "cosine").at(50) == pytest.approx(0.5)
    assert LRSchedule(1.0, 0.0, 0, 100, "constant").at(100) == 1.0


@pytest.mark.parametrize("values", [(0.0, 0.0, 0, 1), (1.0, 2.0, 0, 1), (1.0, 0.1, 5, 4), (float("nan"), 0.0, 0, 1)])
def test_numbers_that_make_no_sense(values: tuple[float, float, int, int]) -> None:
    with pytest.raises(UserError, match=r"--lr|--min-lr"):
        LRSchedule(*values)
