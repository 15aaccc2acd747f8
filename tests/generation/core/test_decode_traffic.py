"""What a decode step does to a GPU, counted on a simulated one: kernels, reads, uploads, and what a graph repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_jobs
import pytest
from factory import random_model, save
from ranks import RankPool

Pools = Callable[[int], RankPool]
NUM_LAYERS = 12  # of the smallest OPT
BATCHES = [1, 16]
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
MARKED = {"temperature": 0.8, "watermark_delta": 2.0}
EACH = pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deep as OPT-125M, and narrow."""
    return save(random_model(num_hidden_layers=NUM_LAYERS), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two layers."""
    return save(random_model(num_hidden_layers=2), tmp_path_factory.mktemp("two"))


@EACH
def test_a_step_without_graphs(simulated_gpus: Pools, model: Path, options: dict[str, Any]) -> None:
    """As many kernels whatever the batch, one read of the step before, and nothing sent."""
    steps = simulated_gpus(1).run(gpu_jobs.traffic_of_a_step, model, BATCHES, options)[0]
    assert all(step == steps[0] for step in steps)
    assert steps[0]["launches"] <= 14 * NUM_LAYERS + 25, steps[0]["kernels"]
    assert (steps[0]["uploads"], steps[0]["asynchronous reads"], steps[0]["blocking reads"]) == (0, 1, 1)


def test_a_step_with_graphs_is_one_launch(simulated_gpus: Pools, model: Path) -> None:
    step = simulated_gpus(1).run(gpu_jobs.traffic_of_a_step, model, [4], GREEDY, "auto")[0][0]
    assert step["kernels"] == {"graph": 1}
    assert (step["uploads"], step["asynchronous reads"], step["blocking reads"]) == (0, 1, 1)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, MARKED], ids=["greedy", "sampled", "marked"])
@pytest.mark.parametrize("tp", [1, 2])
def test_graphs_of_every_size_repeat_the_step(
    simulated_gpus: Pools, two_layers: Path, options: dict[str, Any], tp: int
) -> None:
    """A capture does nothing that CUDA refuses, and nothing on the host; replays give the text of plain steps."""
    sizes = [1, 2, 3, 5, 9, 17, 25, 33, 41, 64] if tp == 1 and options is not MARKED else [1, 3, 9]
    for result in simulated_gpus(tp).run(gpu_jobs.replayed, two_layers, tp, sizes, options):
        for with_graphs, without, num_graphs, num_replays in result:
            assert with_graphs == without
            assert num_graphs >= 1 and num_replays >= 1
