"""LoRA: only the factors move, the same at every layout, from the frozen model on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training_jobs as jobs
from ranks import RankPool

from opt_megatron.errors import UserError
from opt_megatron.model.lora import is_factor
from opt_megatron.model.lora_options import LoRAOptions

LAYOUTS = [
    pytest.param(1, 1, 1, {"recompute_granularity": "full"}, id="recomputed"),
    pytest.param(2, 1, 2, {}, id="TP2"),
    pytest.param(2, 1, 2, {"sequence_parallel": True}, id="TP2 SP"),
    pytest.param(1, 2, 2, {}, id="PP2"),
    pytest.param(1, 1, 2, {}, id="DP2"),
    pytest.param(2, 2, 4, {"sequence_parallel": True, "recompute_granularity": "full"}, id="TP2xPP2 SP recomputed"),
]
LORA = {"lora": LoRAOptions(4)}


@pytest.fixture(scope="module")
def alone_losses(ranks: Callable[[int], RankPool], four_layers: Path) -> list[float]:
    """Ten losses on one process."""
    losses, changed = ranks(1).run(jobs.lora_run, four_layers, 1, 1, LORA)[0]
    assert len(changed) == 4 * 4 * 2
    assert all(is_factor(name) for name in changed)
    return losses


@pytest.mark.parametrize(("tp", "pp", "world", "settings"), LAYOUTS)
def test_ten_steps_are_the_same_at_every_layout(
    ranks: Callable[[int], RankPool],
    four_layers: Path,
    alone_losses: list[float],
    tp: int,
    pp: int,
    world: int,
    settings: dict[str, Any],
) -> None:
    for losses, changed in ranks(world).run(jobs.lora_run, four_layers, tp, pp, LORA | settings):
        assert losses == pytest.approx(alone_losses, abs=1e-4)
        assert changed and all(is_factor(name) for name in changed)


def test_it_begins_with_the_frozen_model(
    ranks: Callable[[int], RankPool], four_layers: Path, alone_losses: list[float]
) -> None:
    frozen = ranks(1).run(jobs.lora_run, four_layers, 1, 1, {})[0][0]
    assert alone_losses[0] == frozen[0]
    assert alone_losses[-1] != frozen[-1]


def test_only_the_named_layers_are_adapted(ranks: Callable[[int], RankPool], four_layers: Path) -> None:
    lora = {"lora": LoRAOptions(2, target_modules=("linear_proj",))}
    changed = ranks(2).run(jobs.lora_run, four_layers, 2, 1, lora)[0][1]
    assert {name.split(".")[-2] for name in changed} == {"linear_proj"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": 2, "alpha": 0.0}, "positive"),
        ({"rank": 2, "target_modules": ("q",)}, "choose"),
    ],
)
def test_options_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRAOptions(**values)
