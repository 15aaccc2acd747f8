"""What is installed, and what the GPU is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

from ...machine import describe_machine
from ..case import Case, Figures, attempt
from ..settings import Settings

_PACKAGES = ("apex", "transformer_engine", "flash_attn", "triton")


def cases(settings: Settings) -> Iterator[Case]:
    """The machine, and packages that Megatron-core or this project use where they are."""
    yield attempt("machine", lambda: (None, describe_machine() | {"cuda": torch.version.cuda}))
    yield attempt("packages", lambda: (None, {name: _state(name) for name in _PACKAGES}))
    if settings.is_cuda:
        yield attempt("GPU", lambda: (None, _gpu()))


def _state(package: str) -> str:
    try:
        return str(getattr(importlib.import_module(package), "__version__", "installed"))
    except Exception as error:  # one that was built for another CUDA raises anything
        return f"{type(error).__name__}: {error}"[:120]


def _gpu() -> Figures:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "devices": torch.cuda.device_count(),
        "multiprocessors": properties.multi_processor_count,
        "GiB": round(properties.total_memory / 2**30, 1),
        "compute capability": f"{properties.major}.{properties.minor}",
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }
