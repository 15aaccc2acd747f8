"""The machine: its description in the results, and whether the models fit into its memory."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError

from .measure import weight_bytes
from .options import BenchmarkOptions

_CACHE_ON_A_GPU = 8 * 10**9  # bytes
_LIBRARIES = ("torch", "megatron-core", "transformers", "ctranslate2")


def describe_machine() -> dict[str, Any]:
    """Processor, memory and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def check_memory(name: str, config: OPTConfig, options: BenchmarkOptions) -> None:
    """Raise UserError unless all systems that are loaded at the same time fit in what is free now."""
    for dtype in options.dtypes:
        systems = options.systems_for(dtype)
        copies = max(len(systems), 2 if "tensor_parallel" in options.workloads else 1)
        needed, free = copies * weight_bytes(config, dtype), psutil.virtual_memory().available
        if options.device == "cpu" and needed > 0.95 * free:
            raise UserError(
                f"{name} in {dtype} takes {needed / 1e9:.1f} GB in {copies} processes, and {free / 1e9:.1f} GB are "
                "free: measure a smaller size, or fewer systems with --peers"
            )


def cache_limit(config: OPTConfig, options: BenchmarkOptions, dtype: str) -> int:
    """Bytes that one system's keys and values may take while the weights of all are loaded.

    They run in turn, so each may take most of what is left.
    """
    if options.device != "cpu":
        return _CACHE_ON_A_GPU
    free = psutil.virtual_memory().available - len(options.systems_for(dtype)) * weight_bytes(config, dtype)
    return int(0.6 * free)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
