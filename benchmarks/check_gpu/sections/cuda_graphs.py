"""Decode steps with CUDA graphs and without: the same tokens, and the time of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from opt_megatron.generation.core.engine import Engine

from ...measure import alternate, spread
from ...workload import make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..settings import SMALL, Settings
from ..timing import Timer

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 1},
}
_ROUNDS = 3


def cases(settings: Settings) -> Iterator[Case]:
    """Batches of several sizes, greedy and sampled, with 125m's shape in float16."""
    parallel = models.start(settings)
    directory = models.make_checkpoint(settings, SMALL)
    batches = (1, 3) if settings.is_tiny else (1, 5, 16, 64)
    engines = {
        state: Engine(
            models.load(directory, parallel, "float16"), parallel, max_batch_size=max(batches), cuda_graphs=state
        )
        for state in ("auto", "off")
    }
    for batch in batches:
        for kind in _KINDS:
            yield attempt(f"{kind}, batch {batch}", partial(_compare, settings, engines, batch, kind))
            if settings.is_cuda and ProfilerActivity.CUDA in supported_activities():
                generate = partial(_generate, settings, engines["off"], batch, kind)
                yield attempt(f"{kind}, batch {batch}: the GPU's work", partial(_gpu_work_a_step, generate))


def _generate(settings: Settings, engine: Engine, batch: int, kind: str, count: int) -> list[tuple[int, ...]]:
    prompts = make_prompts(settings.config(SMALL), batch, 16 if settings.is_tiny else 128, seed=1)
    return models.tokens_of(models.complete(engine, prompts, count, **_KINDS[kind]))


def _compare(settings: Settings, engines: Mapping[str, Engine], batch: int, kind: str) -> tuple[bool, Figures]:
    count = 8 if settings.is_tiny else 32
    timer = Timer(settings)
    generators = {state: partial(_generate, settings, engine, batch, kind) for state, engine in engines.items()}
    tokens = {state: generate(count) for state, generate in generators.items()}  # the first captures the graph
    runs = {
        state: lambda _, generate=generate: {"ms": timer.milliseconds_a_step(generate, count)}
        for state, generate in generators.items()
    }
    times = alternate(runs, _ROUNDS, 0)["ms"]
    return tokens["auto"] == tokens["off"], {f"ms a step, graphs {s}": spread(values) for s, values in times.items()}


def _gpu_work_a_step(generate: Callable[[int], Any]) -> tuple[None, Figures]:
    """What torch's profiler sees without graphs: kernels and copies, those to the host, waits, and the GPU's time."""

    def total(count: int) -> tuple[float, ...]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            generate(count)
            torch.cuda.synchronize()
        events = profiler.events()
        on_gpu = [event for event in events if event.device_type.name == "CUDA"]
        copies = sum("DtoH" in event.name for event in on_gpu)
        waits = sum(event.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for event in events)
        return len(on_gpu), copies, waits, sum(event.time_range.elapsed_us() for event in on_gpu)

    short, long = 8, 16
    names = ("kernels a step", "copies to the host a step", "waits a step", "GPU us a step")
    pairs = zip(names, total(short), total(long), strict=True)
    return None, {name: (after - before) / (long - short) for name, before, after in pairs}
