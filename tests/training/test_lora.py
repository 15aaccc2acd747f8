"""LoRA: only the factors move, the same at every layout, from the frozen model on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training_jobs as jobs
from formats import write_peft
from ranks import RankPool
from safetensors.torch import load_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
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


@pytest.fixture(scope="module")
def adapter(four_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors with ranks and scales of their own for q, v and fc2 of the middle layers."""
    ranks = {"self_attn.q_proj": 2, "self_attn.v_proj": 3, "fc2": 4}
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    write_peft(
        directory,
        load_file(four_layers / "model.safetensors"),
        {f"layers.{layer}.{module}": rank for layer in (1, 2) for module, rank in ranks.items()},
        target_modules=["q_proj", "v_proj", "fc2"],
        layers_to_transform=[1, 2],
        rank_pattern={"q_proj": 2, "v_proj": 3},
        alpha_pattern={"v_proj": 9},
    )
    return directory


def test_an_adapter_of_peft_is_trained_further(
    ranks: Callable[[int], RankPool], four_layers: Path, adapter: Path, tmp_path: Path
) -> None:
    losses, changed = ranks(1).run(jobs.lora_run, four_layers, 1, 1, {"adapter": adapter})[0]
    assert changed == [
        f"decoder.layers.{layer}.{module}.{factor}"
        for layer in (1, 2)
        for module in ("self_attention.linear_qkv", "mlp.linear_fc2")
        for factor in ("lora_a", "lora_b")
    ]
    convert(four_layers, tmp_path / "merged", ConversionOptions(to="hf"), adapter=adapter)
    assert losses[0] == pytest.approx(ranks(1).run(jobs.lora_run, tmp_path / "merged", 1, 1, {})[0][0][0], abs=1e-5)
    for other, _ in ranks(4).run(jobs.lora_run, four_layers, 2, 2, {"adapter": adapter, "sequence_parallel": True}):
        assert other == pytest.approx(losses, abs=1e-4)


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
