"""Training on simulated GPUs: the steps that a CPU takes, and no operation mixes devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_jobs
import pytest
import torch
import training_jobs as jobs
from cuda_simulator.traffic import ASYNCHRONOUS_UPLOAD, READ
from factory import random_model, save
from ranks import RankPool

from opt_megatron.data.options import DataOptions, SupervisedOptions
from opt_megatron.model.lora_options import LoRAOptions
from opt_megatron.training.lr_schedule import LRSchedule
from opt_megatron.training.metrics import METRICS_FILE
from opt_megatron.training.options import OptimizerOptions, TrainerOptions

Pools = Callable[[int], RankPool]
LAYOUTS = [pytest.param(1, 1, id="TP1"), pytest.param(2, 1, id="TP2"), pytest.param(1, 2, id="PP2")]
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "recomputed": {"recompute_granularity": "full"},
    "packed": {},
    "LoRA": {"lora": LoRAOptions(4)},
}
BRIEF = {"micro": 4, "schedule": LRSchedule(1e-3, 1e-4, 0, 5)}
SHARDED = {"optimizer": OptimizerOptions(use_distributed_optimizer=True)}
OVERLAPPED = {"optimizer": OptimizerOptions(use_distributed_optimizer=True, overlap_param_gather=True)}
TRANSFORMER_ENGINE = {"transformer_impl": "transformer_engine"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers."""
    return save(random_model(num_hidden_layers=2, scale=0.02), tmp_path_factory.mktemp("model"))


def curve_on_a_cpu(ranks: Pools, model: Path, options: dict[str, Any], packed: bool = False) -> list[float]:
    """The losses of two steps."""
    return ranks(1).run(jobs.loss_curve, model, 1, 1, 2, options, packed)[0]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step(simulated_gpus: Pools, ranks: Pools, model: Path, kind: str, tp: int, pp: int) -> None:
    options = BRIEF | KINDS[kind]
    expected = curve_on_a_cpu(ranks, model, options, kind == "packed")
    for losses in simulated_gpus(tp * pp).run(jobs.loss_curve, model, tp, pp, 2, options, kind == "packed"):
        assert losses == pytest.approx(expected, abs=2e-2 if "16" in kind else 1e-4)


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        pytest.param(2, {"sequence_parallel": True}, id="sequence parallel"),
        pytest.param(1, {}, id="data parallel"),
        pytest.param(1, SHARDED, id="distributed optimizer"),
        pytest.param(1, OVERLAPPED, id="overlapped gather of parameters"),
    ],
)
def test_two_ranks(simulated_gpus: Pools, ranks: Pools, model: Path, tp: int, options: dict[str, Any]) -> None:
    expected = curve_on_a_cpu(ranks, model, BRIEF)
    for losses in simulated_gpus(2).run(jobs.loss_curve, model, tp, 1, 2, BRIEF | options):
        assert losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("tp", "pp", "ranks", "options", "options_at_first"),
    [
        pytest.param(1, 1, 1, {}, {}, id="TP1"),
        pytest.param(2, 1, 2, {}, {}, id="TP2"),
        pytest.param(1, 2, 2, {}, {}, id="PP2"),
        pytest.param(1, 1, 2, SHARDED, OVERLAPPED, id="distributed optimizer, at first overlapped"),
        pytest.param(1, 1, 1, {}, TRANSFORMER_ENGINE, id="at first by TransformerEngine's names"),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(
    simulated_gpus: Pools,
    model: Path,
    corpus: str,
    tmp_path: Path,
    tp: int,
    pp: int,
    ranks: int,
    options: dict[str, Any],
    options_at_first: dict[str, Any],
) -> None:
    data = DataOptions(train_data_path=[corpus], valid_data_path=[corpus])
    base = jobs.settings_for(model, dtype=torch.bfloat16, data=data, **options)
    settings = replace(
        base,
        config=base.config.replace(dropout=0.1, attention_dropout=0.1),
        trainer=TrainerOptions(5, jobs.GLOBAL, jobs.SEQ, 4, log_interval=1, eval_interval=2, eval_iters=1),
    )
    pool = simulated_gpus(ranks)
    pool.run(jobs.whole_run, tmp_path / "whole", tp, pp, settings)
    pool.run(jobs.whole_run, tmp_path / "cut", tp, pp, replace(settings, **options_at_first), 3)
    pool.run(jobs.whole_run, tmp_path / "cut", tp, pp, settings)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / METRICS_FILE).read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert len(losses[0]) == 5 + 3 and losses[0] == losses[1]


def test_training_on_the_cpu_leaves_the_gpu_alone(simulated_gpus: Pools, ranks: Pools, model: Path) -> None:
    losses, traffic = simulated_gpus(1).run(gpu_jobs.trained_on_the_cpu, model, 2, BRIEF)[0]
    assert losses == pytest.approx(curve_on_a_cpu(ranks, model, BRIEF), abs=1e-5)
    assert not traffic


@pytest.mark.parametrize(("kind", "num_reads"), [("float32", 3), ("bfloat16", 3), ("float16", 5)])
def test_how_often_a_step_waits(simulated_gpus: Pools, model: Path, kind: str, num_reads: int) -> None:
    """For the norm of all gradients, for the losses, and whether there are tokens (Megatron-core asks that); float16
    also for its scale and whether it overflowed."""
    found = simulated_gpus(1).run(gpu_jobs.transfers_of_a_training_step, model, BRIEF | KINDS[kind])[0]
    assert found == {READ: num_reads, ASYNCHRONOUS_UPLOAD: 2 * 4}  # two micro-batches of four tensors


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"lora": LoRAOptions(4)}, "has no layers with LoRA", id="LoRA"),
        pytest.param({"data": None, "supervised": SupervisedOptions(("x",))}, "packed examples", id="packed"),
        pytest.param({"config": "post-norm"}, "normalises before attention and MLP", id="post-norm"),
        pytest.param({}, "not installed", id="absent"),
    ],
)
def test_where_transformer_engine_cannot_be_used(
    simulated_gpus: Pools, model: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    settings = jobs.settings_for(model, data=DataOptions(("x",)), **TRANSFORMER_ENGINE)
    if changes.get("config"):
        changes = {"config": settings.config.replace(do_layer_norm_before=False, has_final_layer_norm=False)}
    message = simulated_gpus(1).run(jobs.refusal, tmp_path / "run", replace(settings, **changes))[0]
    assert message.startswith("--transformer-impl transformer_engine ") and reason in message
    assert not (tmp_path / "run").exists()
