"""Fixtures: worlds of ranks, and models that are made once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# ruff: noqa: E402
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from opt_megatron.core_compat import prepare_megatron

prepare_megatron()

import torch
from factory import random_model, save
from ranks import RankPool

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.parallel import ParallelContext, init_parallel

torch.set_num_threads(1)  # these models gain nothing from more, and lose much where other processes are busy


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: n processes that are ranks of one world."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for made in pools.values():
        made.close()


@pytest.fixture(scope="session")
def alone() -> ParallelContext:
    """The context of this process, a world of one."""
    return init_parallel()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> (Hugging Face directory, transformers' model in float32)."""
    from transformers import OPTForCausalLM

    made: dict[str, tuple[Path, Any]] = {}
    for name, overrides in {
        "pre-norm": {},
        "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},  # as 350m is
    }.items():
        model = random_model(**overrides)
        made[name] = save(model, tmp_path_factory.mktemp(name)), model
    made["story"] = EMBEDDED_DIRECTORY, OPTForCausalLM.from_pretrained(EMBEDDED_DIRECTORY, dtype="float32").eval()
    return made
