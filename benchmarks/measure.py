"""Alternating runs, statistics of their times, and the limit set by the memory's bandwidth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opt_megatron.config import OPTConfig

_LEAST_BUFFER = 256 * 2**20  # bytes
_BYTES = {"float32": 4, "int8": 1, "bfloat16": 2, "float16": 2}


def alternate(
    runs: Mapping[str, Callable[[int], dict[str, float]]], repeats: int, settle_seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Run every system once, `repeats` times over, each round beginning with another one.

    A change of the machine's speed meanwhile then affects all of them.

    Args:
        runs: for each system a function of the round's number that measures once: metric -> value.
        settle_seconds: pause before each run.

    Returns:
        metric -> system -> its values in the order of measuring.
    """
    samples: dict[str, dict[str, list[float]]] = {}
    names = list(runs)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(settle_seconds)
            for metric, value in runs[name](repeat).items():
                samples.setdefault(metric, {}).setdefault(name, []).append(value)
    # The systems in their own order, whichever began.
    return {metric: {name: values[name] for name in names if name in values} for metric, values in samples.items()}


def spread(samples: list[float]) -> dict[str, Any]:
    """Median, lowest and highest of the samples, and the samples."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least `percent` percent of the values do not exceed."""
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


def weight_bytes(config: OPTConfig, dtype: str) -> int:
    """Bytes of weights that one decoding step reads: every matrix, and the output head.

    Not counted: the embedding and the positions, of which a step reads a row or two; biases and norms, and the
    scales of int8 (less than 1%).
    """
    h, f, w = config.hidden_size, config.ffn_hidden_size, config.word_embed_proj_dim
    elements = config.num_layers * (4 * h * h + 2 * h * f) + config.vocab_size * w
    elements += 2 * h * w if config.has_embedding_projection else 0
    return elements * _BYTES[dtype]


def float_dtype(dtype: str, device: str) -> str:
    """The dtype of activations, keys and values: with int8 weights what each device computes fastest."""
    return dtype if dtype != "int8" else "float16" if device == "cuda" else "float32"


def cache_bytes(config: OPTConfig, dtype: str, tokens: int, device: str = "cpu") -> int:
    """Bytes of keys and values that one row's decoding step reads after `tokens` tokens."""
    size = _BYTES[float_dtype(dtype, device)]
    return 2 * config.num_layers * config.hidden_size * tokens * size


def measure_bandwidth(threads: int, device: str, repeats: int = 7) -> dict[str, Any]:
    """Read bandwidth of the memory: the best of several ways to read a tensor that no cache holds.

    Returns:
        `gb_per_s` (the best), `kernels` (GB/s of the best run of each) and `bytes` (of the tensor).
    """
    import torch

    torch.set_num_threads(threads)
    num_bytes = 4 * 2**30 if device == "cuda" else max(_LEAST_BUFFER, 8 * _last_level_cache())
    x = torch.ones(num_bytes // 4, device=device).view(-1, 4096)  # [rows, 4096] float32
    flat, vector, row = x.view(-1), torch.ones(4096, device=device), torch.ones(x.shape[0], device=device)
    kernels: dict[str, Callable[[], Any]] = {
        "sum": lambda: flat.sum(),
        "max": lambda: flat.amax(),
        "dot": lambda: torch.dot(flat, flat),
        "matrix x vector": lambda: torch.mv(x, vector),
        "vector x matrix": lambda: torch.mv(x.t(), row),
    }
    best = {}
    for name, kernel in kernels.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            kernel()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        best[name] = x.numel() * 4 / min(times) / 1e9
    return {"gb_per_s": max(best.values()), "kernels": best, "bytes": x.numel() * 4}


def _last_level_cache() -> int:
    """Its size in bytes, or 0 where the system does not give it."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * unit if unit else 0)
    return max(sizes)
