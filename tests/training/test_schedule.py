"""The learning rate, the recipe's numbers, and the FLOPs of a step."""

from __future__ import annotations

import pytest

from opt_megatron.config import released_config
from opt_megatron.errors import UserError
from opt_megatron.training.recipe import RECIPES, find_recipe
from opt_megatron.training.schedule import Schedule, flops_per_token


def test_warm_up_and_linear_decay() -> None:
    schedule = Schedule(6e-4, 6e-5, 10, 110)
    assert schedule.at(1) == pytest.approx(6e-5)
    assert schedule.at(10) == 6e-4
    assert schedule.at(60) == pytest.approx((6e-4 + 6e-5) / 2)
    assert schedule.at(110) == schedule.at(500) == pytest.approx(6e-5)


def test_other_decays() -> None:
    assert Schedule(1.0, 0.0, 0, 100, "cosine").at(50) == pytest.approx(0.5)
    assert Schedule(1.0, 0.0, 0, 100, "constant").at(100) == 1.0


@pytest.mark.parametrize("values", [(0.0, 0.0, 0, 1), (1.0, 2.0, 0, 1), (1.0, 0.1, 5, 4), (float("nan"), 0.0, 0, 1)])
def test_numbers_that_make_no_sense(values: tuple[float, float, int, int]) -> None:
    with pytest.raises(UserError, match=r"--lr|--min-lr"):
        Schedule(*values)


def test_every_row_of_the_recipe() -> None:
    # metaseq's own numbers of updates and of warm-up updates
    rows = {size: (r.global_batch_size * 2048, r.lr, r.train_iters, r.lr_warmup_iters) for size, r in RECIPES.items()}
    assert rows == {
        "8m": (131072, 1e-3, 2288818, 2861),
        "125m": (524288, 6e-4, 572204, 715),
        "350m": (524288, 3e-4, 572204, 715),
        "1.3b": (1048576, 2e-4, 286102, 357),
        "2.7b": (1048576, 1.6e-4, 286102, 357),
        "6.7b": (2097152, 1.2e-4, 143051, 178),
        "13b": (4194304, 1e-4, 71525, 89),
        "30b": (4194304, 1e-4, 71525, 89),
        "66b": (2097152, 8e-5, 143051, 178),
        "175b": (2097152, 3e-5, 143051, 178),
    }
    assert RECIPES["8m"].config.num_attention_heads == 2
    assert (RECIPES["125m"].config.dropout, RECIPES["125m"].config.attention_dropout) == (0.1, 0.1)
    assert find_recipe("facebook/opt-125m") is RECIPES["125m"]
    with pytest.raises(UserError, match="there are 8m, 125m"):
        find_recipe("7b")


def test_flops_are_six_a_parameter_and_the_attention() -> None:
    config = released_config("opt-175b")
    matrices = config.num_layers * 12 * config.hidden_size**2 + config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.hidden_size * 2048
    assert flops_per_token(config, 2048) == pytest.approx(6 * matrices + attention)
