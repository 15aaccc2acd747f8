"""The memory estimate against models and caches that are really allocated."""

import pytest
import rank_jobs
import torch

from opt_megatron.checkpoint.memory_estimate import Workload, estimate_ranks, smallest_layouts
from opt_megatron.config import OPTConfig, released_config


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_weights_cache_and_reads_are_what_ranks_really_hold(models, ranks, name, tp, pp):
    directory = models[name][0]
    config = OPTConfig.from_directory(directory)
    plans = estimate_ranks(config, tp, pp, Workload(3, 128, "float32"), "float32")
    measured = ranks(tp * pp).run(rank_jobs.bytes_held_and_read, directory, tp, pp, 3, 128)
    assert [(p.weights, p.kv_cache, p.read_from_disk) for p in plans] == measured


def test_what_ranks_hold_adds_up_to_the_model():
    config = released_config("opt-6.7b")
    plans = estimate_ranks(config, 4, 2, Workload(1, 2048, "float16"), "float16")
    assert [plan.layers for plan in plans[::4]] == [range(0, 16), range(16, 32)]
    assert [plan.heads for plan in plans[:4]] == [range(n, n + 8) for n in (0, 8, 16, 24)]
    rows = [row for plan in plans[:4] for row in plan.vocabulary_rows]
    assert rows == list(range(config.vocab_size))
    # The tied head doubles the embedding; norms, positions and row-parallel biases are on every tensor rank.
    total = sum(plan.weights for plan in plans) / 2
    h = config.hidden_size
    replicated = 3 * (config.num_layers * 6 * h + 2 * h + config.num_position_rows * h)
    assert total == config.num_parameters + config.vocab_size * h + replicated


def test_activations_cover_what_a_prefill_allocates(models, alone):
    """The peak of a real forward pass, by torch's own count of CPU allocations, against the plan's figure."""
    from opt_megatron.checkpoint.load import load_model
    from opt_megatron.generation.core.model_runner import ModelRunner
    from opt_megatron.generation.sampling.logits_processors import NO_IDS
    from opt_megatron.generation.step import KVCacheBlocks, OutputKind, ScheduledSequence, StepInput

    directory = models["pre-norm"][0]
    config = OPTConfig.from_directory(directory)
    plan = estimate_ranks(config, 1, 1, Workload(4, 200, "float32"), "float32")[0]
    runner = ModelRunner(load_model(directory, None, alone), alone, NO_IDS)
    runner.allocate(4 * 256)
    sequences = tuple(ScheduledSequence(KVCacheBlocks(256 * n, 256), 0, (5,) * 200, 1) for n in range(4))
    step = StepInput(sequences, OutputKind.LOGITS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        runner.forward(step)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.nbytes():
            current += event.nbytes()
            peak = max(peak, current)
    assert 0.5 * plan.activations <= peak <= 1.5 * plan.activations


def test_smallest_layouts_fit_and_smaller_ones_do_not():
    config, workload = released_config("opt-66b"), Workload(1, 2048, "float16")
    memory = 40_000_000_000
    layouts = smallest_layouts(config, workload, "float16", memory)
    assert layouts and all(fullest <= memory for _, _, fullest in layouts)
    ranks = layouts[0][0] * layouts[0][1]
    assert all(tp * pp == ranks for tp, pp, _ in layouts)
    assert config.num_parameters * 2 / memory <= ranks
    assert smallest_layouts(config, workload, "float16", 1_000_000) == []
