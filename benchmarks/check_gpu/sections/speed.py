"""Decoding and prefill: against transformers, and against what the memory and the matrix units could give."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from ...measure import alternate, cache_bytes, measure_bandwidth, spread, weight_bytes
from ...system_protocol import Setup, System
from ...systems import OURS, SYSTEMS
from ...workload import PromptTokens, make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..settings import Settings
from ..timing import Timer

_PEER = "transformers"
_ROUNDS = 3


def cases(settings: Settings, size: str) -> Iterator[Case]:
    """The machine's limits; float16 against transformers; the other kinds of weights, in turn with each other."""
    models.start(settings)
    models.make_checkpoint(settings, size)
    limits = attempt("limits", lambda: (None, _limits(settings)))
    yield limits
    peers = {f"{_PEER} float16": (_PEER, "float16")} if models.has_transformers() else {}
    for group in (
        {f"{OURS} float16": (OURS, "float16")} | peers,
        {"bfloat16": (OURS, "bfloat16"), "int8": (OURS, "int8")},
    ):
        yield from _group(settings, size, group, limits.figures)


def _group(settings: Settings, size: str, kinds: Mapping[str, tuple[str, str]], limits: Figures) -> Iterator[Case]:
    """Each workload of systems that run in turn; `kinds` are names with (system, dtype)."""
    systems: dict[str, System] = {}
    setups = {
        name: Setup(settings.checkpoint(size), dtype, settings.threads, settings.device)
        for name, (_, dtype) in kinds.items()
    }
    names = ", ".join(kinds)

    def load() -> tuple[None, Figures]:
        for name, setup in setups.items():
            system = SYSTEMS[kinds[name][0]]
            system.prepare(setup)
            systems[name] = system(setup)
        return None, {"systems": list(systems)}

    loaded = attempt(f"loading of {names}", load)
    if loaded.error:
        yield loaded
        return
    for batch in (1, 4) if settings.is_tiny else (1, 16, 64):
        decode = partial(_decode, settings, settings.config(size), systems, setups, batch, limits)
        yield attempt(f"decode, batch {batch}: {names}", decode)
    yield attempt(f"prefill: {names}", partial(_prefill, settings, settings.config(size), systems, limits))


def _limits(settings: Settings) -> Figures:
    width = 256 if settings.is_tiny else 8192
    left = torch.randn(width, width, device=settings.device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    timer = Timer(settings)
    seconds = statistics.median(timer.seconds(lambda: left @ right) for _ in range(6))
    bandwidth = measure_bandwidth(settings.threads, settings.device, repeats=1 if settings.is_tiny else 7)
    return {"GB/s": bandwidth["gb_per_s"], "TFLOP/s": 2 * width**3 / seconds / 1e12}


def _decode(
    settings: Settings,
    config: models.OPTConfig,
    systems: Mapping[str, System],
    setups: Mapping[str, Setup],
    batch: int,
    limits: Figures,
) -> tuple[bool | None, Figures]:
    """Milliseconds a step after prompts, from the first new token to the last."""
    length, steps = (16, 4) if settings.is_tiny else (128, 32)
    prompts = make_prompts(config, batch, length, seed=1)

    for system in systems.values():
        system.generate(prompts, 6)  # libraries prepare themselves, graphs are captured
    runs = {
        name: lambda _, system=system: {"ms": system.generate(prompts, steps + 1).milliseconds_a_step}
        for name, system in systems.items()
    }
    samples = alternate(runs, _ROUNDS, 0)["ms"]
    figures: Figures = {}
    for name, values in samples.items():
        figures[f"ms a step, {name}"] = measured = spread(values)
        if "GB/s" in limits:
            dtype = setups[name].dtype
            cache = batch * cache_bytes(config, dtype, length + steps // 2, settings.device)
            limit = (weight_bytes(config, dtype) + cache) / limits["GB/s"] / 1e6
            figures[f"share of the memory's speed, {name}"] = limit / measured["median"]
    return _is_faster(samples) if settings.is_cuda else None, figures


def _prefill(
    settings: Settings, config: models.OPTConfig, systems: Mapping[str, System], limits: Figures
) -> tuple[bool | None, Figures]:
    """Tokens a second of one long prompt, until its first new token."""
    length = 64 if settings.is_tiny else 2000
    rounds = [make_prompts(config, 1, length, seed=number) for number in range(_ROUNDS + 1)]

    def measure(system: System, prompts: Sequence[PromptTokens]) -> dict[str, float]:
        return {"ms": system.generate(list(prompts), 1).seconds * 1e3}

    for system in systems.values():
        measure(system, rounds[-1])
    runs = {name: lambda n, system=system: measure(system, rounds[n]) for name, system in systems.items()}
    samples = alternate(runs, _ROUNDS, 0)["ms"]
    h, f = config.hidden_size, config.ffn_hidden_size
    flops = 2 * length * config.num_layers * (4 * h * h + 2 * h * f + h * length)  # attention is causal: half of it
    figures: Figures = {}
    for name, values in samples.items():
        figures[f"ms, {name}"] = measured = spread(values)
        figures[f"tokens a second, {name}"] = length / measured["median"] * 1e3
        if "TFLOP/s" in limits:
            share = flops / measured["median"] / 1e9 / limits["TFLOP/s"]
            figures[f"share of the matrix units' speed, {name}"] = share
    return _is_faster(samples) if settings.is_cuda else None, figures


def _is_faster(samples: Mapping[str, list[float]]) -> bool | None:
    """Than transformers; None where it was not measured."""
    medians = {name: statistics.median(values) for name, values in samples.items()}
    theirs = [value for name, value in medians.items() if name.startswith(_PEER)]
    return None if not theirs else all(value <= theirs[0] for value in medians.values())
