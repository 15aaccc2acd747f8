"""One step and fifty: the same numbers as transformers and torch's autograd, at every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs as jobs
from factory import random_model, save
from ranks import RankPool

from opt_megatron.checkpoint.parameter_mapping import block_view, layers_of_stage, rank_block, stage_parameters
from opt_megatron.config import OPTConfig
from opt_megatron.model.parameter_names import local_name
from opt_megatron.training.init_weights import initial_values
from opt_megatron.training.lr_schedule import LRSchedule

# tensor, pipeline, processes, settings
LAYOUTS = [
    pytest.param(1, 1, 1, {}, id="alone"),
    pytest.param(1, 1, 1, {"micro": 2}, id="micro-batches of 2"),
    pytest.param(1, 1, 1, {"recompute_granularity": "full"}, id="recomputed"),
    pytest.param(1, 1, 1, {"recompute_granularity": "selective"}, id="attention recomputed"),
    pytest.param(2, 1, 2, {}, id="TP2"),
    pytest.param(2, 1, 2, {"sequence_parallel": True}, id="TP2 SP"),
    pytest.param(1, 2, 2, {}, id="PP2"),
    pytest.param(1, 1, 2, {}, id="DP2"),
    pytest.param(1, 1, 2, {"micro": 1}, id="DP2, micro-batches of 1"),
    pytest.param(2, 2, 4, {"sequence_parallel": True, "recompute_granularity": "full"}, id="TP2xPP2 SP recomputed"),
    pytest.param(2, 1, 4, {}, id="TP2xDP2"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Pre-norm and post-norm models of four layers, saved and with gradients of the first global batch."""
    made = {}
    for name, changes in {
        "pre-norm": {},
        "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "vocab_size": 517},  # padded at TP2
    }.items():
        model = random_model(num_hidden_layers=4, **changes)
        directory = save(model, tmp_path_factory.mktemp(name))
        oracle_loss(model, 0).backward()
        made[name] = directory, model
    return made


def oracle_loss(model: Any, first: int) -> torch.Tensor:
    """transformers' mean loss of a global batch, by torch's own cross entropy."""
    data = jobs.RandomTokens(jobs.GLOBAL * 4, model.config.vocab_size)
    samples = [data[(first + n) % len(data)] for n in range(jobs.GLOBAL)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    logits = model(input_ids=batch["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm"])
@pytest.mark.parametrize(("tp", "pp", "world", "settings"), LAYOUTS)
def test_loss_and_gradients_equal_transformers(
    ranks: Callable[[int], RankPool],
    small: dict[str, tuple[Path, Any]],
    kind: str,
    tp: int,
    pp: int,
    world: int,
    settings: dict[str, Any],
) -> None:
    directory, model = small[kind]
    with torch.no_grad():
        expected_loss = float(oracle_loss(model, 0))
    oracle = {name: p.grad for name, p in model.named_parameters()}
    config = OPTConfig.from_directory(directory)
    results = ranks(world).run(jobs.gradients, directory, tp, pp, settings)
    total, tokens = (sum(losses[n] for losses, _, _ in results) / tp for n in range(2))
    norm = float(torch.stack([gradient.norm() for gradient in oracle.values()]).norm())
    assert [found_norm for _, found_norm, _ in results] == [pytest.approx(norm, rel=1e-5)] * world
    assert total / tokens == pytest.approx(expected_loss, rel=1e-5)
    dp = world // (tp * pp)
    for rank, (_, _, found) in enumerate(results):  # Megatron's order: tensor, data, pipeline
        stage, tp_rank = rank // (tp * dp), rank % tp
        layers = layers_of_stage(config.num_layers, pp, stage)
        rows = stage_parameters(config, layers, first=stage == 0, last=stage == pp - 1)
        assert {row.megatron for row in rows} == found.keys()
        for row in rows:
            expected = torch.zeros_like(found[row.megatron])
            for part, name in enumerate(row.canonical):
                block = rank_block(oracle[name].shape, row.split, tp_rank, tp)
                view = block_view(expected, part, len(row.canonical), config.head_dim, block)
                view.copy_(oracle[name][block].reshape(view.shape))
            largest = max(float(oracle[name].abs().max()) for name in row.canonical)
            # Keys' biases have no gradient (softmax does not change): what stands there is rounding.
            difference = (found[row.megatron] - expected).abs().max()
            assert difference <= 1e-5 * max(largest, 1e-3), (rank, row.megatron)


@pytest.mark.parametrize(
    ("tp", "pp", "world", "settings"),
    [layout for layout in LAYOUTS if layout.id in ("alone", "TP2 SP", "PP2")],
)
def test_the_spec_of_transformer_engine_is_the_same_model(
    ranks: Callable[[int], RankPool],
    small: dict[str, tuple[Path, Any]],
    tp: int,
    pp: int,
    world: int,
    settings: dict[str, Any],
) -> None:
    """By a stand-in for its modules, which has their parameters' names."""
    run = partial(ranks(world).run, jobs.gradients, small["pre-norm"][0], tp, pp)
    for (losses, norm, expected), (their_losses, their_norm, found) in zip(
        run(settings), run(settings | {"transformer_impl": "transformer_engine"}), strict=True
    ):
        assert their_losses == losses
        assert their_norm == pytest.approx(norm, rel=1e-12)  # the order of its sum is the parameters'
        assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in found
        assert {local_name(name) for name in found} == expected.keys()
        assert all(torch.equal(gradient, expected[local_name(name)]) for name, gradient in found.items())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_cross_entropy(
    ranks: Callable[[int], RankPool], small: dict[str, tuple[Path, Any]], tp: int, dtype: torch.dtype
) -> None:
    """It rounds the gradients of the logits to bfloat16, which they are rounded to anyway with --bf16 alone."""
    run = partial(ranks(tp).run, jobs.gradients, small["pre-norm"][0], tp, 1)
    plain, fused = run({"dtype": dtype}), run({"dtype": dtype, "cross_entropy_loss_fusion": True})
    for (losses, norm, _), (fused_losses, fused_norm, _) in zip(plain, fused, strict=True):
        assert fused_losses == losses and fused_norm == pytest.approx(norm, rel=1e-3)
        assert (fused_norm == norm) == (dtype == torch.bfloat16)


# From OPT's initialisation: the random model above has gradients that are rounding alone, which Adam makes steps of.
SCRATCH = {"load": None, "init_std": 0.02, "schedule": LRSchedule(5e-4, 5e-5, 5, 50)}


@pytest.mark.parametrize(
    ("tp", "pp", "world", "settings"),
    [layout for layout in LAYOUTS if layout.id not in ("alone", "attention recomputed", "TP2xDP2")],
)
def test_thirty_steps_are_the_same_at_every_layout(
    ranks: Callable[[int], RankPool],
    small: dict[str, tuple[Path, Any]],
    alone_curve: list[float],
    tp: int,
    pp: int,
    world: int,
    settings: dict[str, Any],
) -> None:
    curves = ranks(world).run(jobs.loss_curve, small["pre-norm"][0], tp, pp, 30, SCRATCH | settings)
    for curve in curves:
        assert curve == pytest.approx(alone_curve[:30], abs=1e-4)


@pytest.fixture(scope="module")
def alone_curve(ranks: Callable[[int], RankPool], small: dict[str, tuple[Path, Any]]) -> list[float]:
    """Fifty losses on one process."""
    return ranks(1).run(jobs.loss_curve, small["pre-norm"][0], 1, 1, 50, SCRATCH)[0]


def test_fifty_steps_equal_transformers_with_torchs_adamw(
    small: dict[str, tuple[Path, Any]], alone_curve: list[float]
) -> None:
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(small["pre-norm"][0], dtype="float32")
    config = OPTConfig.from_directory(small["pre-norm"][0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values(name, config, 1, SCRATCH["init_std"]))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    curve = []
    for step in range(50):
        for group in adam.param_groups:
            group["lr"] = SCRATCH["schedule"].at(step + 1)
        adam.zero_grad()
        loss = oracle_loss(model, step * jobs.GLOBAL)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        curve.append(float(loss.detach()))
    assert alone_curve == pytest.approx(curve, abs=1e-4)
    assert curve[-1] < curve[0] - 0.2  # it has learnt the repeated batches: the curves are not trivially equal
