"""OPT's initial values: the stated distributions, the same at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_jobs as jobs
from ranks import RankPool

from opt_megatron.checkpoint.parameter_mapping import EMBEDDING, POSITIONS, canonical_shapes
from opt_megatron.config import OPTConfig
from opt_megatron.training.init_weights import initial_values, normal_rows
from opt_megatron.training.recipe import RECIPES


@pytest.mark.parametrize("size", RECIPES)
def test_every_size_has_the_recipes_distributions(size: str) -> None:
    config = RECIPES[size].config
    wide = config.hidden_size // config.num_attention_heads * 2  # small dimensions, this size's number of layers
    width = wide // 2 if config.has_embedding_projection else wide
    small = config.replace(
        hidden_size=wide, num_attention_heads=2, ffn_hidden_size=4 * wide, word_embed_proj_dim=width, vocab_size=512
    )
    names = [name for name in canonical_shapes(small) if ".layers." not in name or ".layers.0." in name]
    assert names
    for name in names:
        values = initial_values(name, small, seed=1, std=0.006)
        if "layer_norm" in name or name.endswith(".bias"):
            assert (values == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name
            continue
        expected = 0.006 / math.sqrt(2 * config.num_layers) if "out_proj" in name or "fc2" in name else 0.006
        drawn = values[values.abs().sum(1) > 0]
        error = 1 / math.sqrt(2 * drawn.numel())  # of an estimated standard deviation
        assert drawn.std().item() == pytest.approx(expected, rel=6 * error), name
        assert abs(drawn.mean().item()) < 6 * expected / math.sqrt(drawn.numel()), name
    assert not initial_values(EMBEDDING, small, 1, 0.006)[small.pad_token_id].any()
    assert not initial_values(POSITIONS, small, 1, 0.006)[1].any()


def test_tensors_differ_and_seeds_differ() -> None:
    config = RECIPES["8m"].config
    names = ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.fc1.weight"]
    first, second = (initial_values(name, config, 1, 0.006) for name in names)
    assert not torch.equal(first, second)
    assert not torch.equal(first, initial_values(names[0], config, 2, 0.006))
    assert torch.equal(first[100:300], initial_values(names[0], config, 1, 0.006, slice(100, 300)))


def test_rows_are_cut_at_any_place() -> None:
    whole = normal_rows("x", (200, 3), slice(0, 200), 5)
    for start, stop in ((0, 1), (63, 65), (64, 128), (130, 200), (199, 200)):
        assert torch.equal(normal_rows("x", (200, 3), slice(start, stop), 5), whole[start:stop])


@pytest.mark.parametrize("kind", ["four_layers", "post_norm"])
def test_ranks_hold_parts_of_the_same_model(
    ranks: Callable[[int], RankPool], request: pytest.FixtureRequest, kind: str
) -> None:
    directory: Path = request.getfixturevalue(kind)
    head_dim = OPTConfig.from_directory(directory).head_dim
    whole = ranks(1).run(jobs.initial_parameters, directory, 1, 1)[0]
    halves = ranks(2).run(jobs.initial_parameters, directory, 2, 1)
    for name, value in whole.items():
        parts = [half[name] for half in halves]
        if parts[0].shape == value.shape:
            assert all(torch.equal(part, value) for part in parts), name
        else:
            dim = next(d for d in range(value.dim()) if parts[0].size(d) != value.size(d))
            whole_size = value.size(dim)
            assert torch.equal(torch.cat(parts, dim).narrow(dim, 0, whole_size), value), name
            assert not torch.cat(parts, dim)[whole_size:].any()  # padding of the vocabulary
    assert whole["decoder.layers.0.self_attention.linear_qkv.weight"].shape[0] % (3 * head_dim) == 0
