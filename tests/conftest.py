"""Fixtures: worlds of ranks, and models that are made once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# ruff: noqa: E402
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor for a GPU: several ranks cannot share one, and the oracle is on the CPU
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from opt_megatron.parallel.core_compat import import_core

import_core()

import torch
from factory import random_model, save
from ranks import RankPool

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.parallel.context import ParallelContext, init_parallel

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
def simulated_gpus() -> Iterator[Callable[[int], RankPool]]:
    """`simulated_gpus(n)`: n ranks with a simulated GPU each; a job there fails where it mixes devices."""
    from cuda_simulator.build_guard import CannotSimulate, guard_library

    try:
        guard_library()
    except CannotSimulate as error:
        pytest.skip(str(error))
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if not pools:
            pools.update({size: RankPool(size, has_gpus=True) for size in (1, 2)})  # they start at the same time
        return pools[world_size]

    yield pool
    for made in pools.values():
        made.close()


@pytest.fixture(scope="session")
def alone() -> ParallelContext:
    """The context of this process, a world of one."""
    return init_parallel()


@pytest.fixture(scope="module")
def server(alone: ParallelContext) -> Iterator[Any]:
    """A server that the tests of a module share; it is ready, and nothing runs on it."""
    from running_server import running  # here, so that tests of other areas need no web framework

    with running(alone) as made:
        made.wait_for(lambda: made.request("GET", "/health").status == 200)
        yield made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> (Hugging Face directory, transformers' model in float32)."""
    from transformers import OPTForCausalLM

    made: dict[str, tuple[Path, Any]] = {}
    for name, overrides in {
        "pre-norm": {},
        # As 350m is, and with a vocabulary that no tensor parallel size divides.
        "post-norm": {
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 24,
            "vocab_size": 517,
            "num_hidden_layers": 4,
        },
    }.items():
        model = random_model(**overrides)
        made[name] = save(model, tmp_path_factory.mktemp(name)), model
    made["story"] = EMBEDDED_DIRECTORY, OPTForCausalLM.from_pretrained(EMBEDDED_DIRECTORY, dtype="float32").eval()
    return made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of an indexed corpus: 300 documents of 10 to 89 tokens, of which the next is often the same again."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("corpus") / "random_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        words = torch.randint(4, 516, (10 + number % 80,), generator=generator)
        document = torch.cat([words.repeat_interleave(2)[:-1], torch.tensor([2])])
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four layers as a Hugging Face directory."""
    return save(random_model(num_hidden_layers=4), tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="session")
def post_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One as 350m is, with a vocabulary that no tensor parallel size divides."""
    model = random_model(num_hidden_layers=4, do_layer_norm_before=False, word_embed_proj_dim=24, vocab_size=517)
    return save(model, tmp_path_factory.mktemp("post"))
