"""The large model on all GPUs: the tokens that one gives, and the time of a step."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from ...system_protocol import Setup
from ...systems import OURS
from ...worker import Worker
from ...workload import make_prompts
from ..case import Case, Figures
from ..settings import Settings

_DTYPES = ("float32", "float16")  # the first for the tokens


def cases(settings: Settings, deadline: float) -> Iterator[Case]:
    """Each dtype, first on one GPU, then on all. Runs in the parent process; the random model is there."""
    ranks = _tensor_parallel_size(settings)
    if ranks == 1:
        yield Case("one device", figures={"devices": settings.num_devices})
        return
    for dtype in _DTYPES:
        (alone, ms_alone), (together, ms_together) = (_run(settings, dtype, count, deadline) for count in (1, ranks))
        figures: Figures = {"ms a step, TP1": ms_alone, f"ms a step, TP{ranks}": ms_together}
        figures["rows with the same greedy tokens"] = sum(map(operator.eq, alone, together))
        yield Case(f"TP{ranks}, {dtype}", alone == together if dtype == _DTYPES[0] else None, figures)


def _tensor_parallel_size(settings: Settings) -> int:
    """The most devices among which the heads can be divided."""
    heads = settings.config(settings.size).num_attention_heads
    return max(size for size in range(1, settings.num_devices + 1) if heads % size == 0)


def _run(settings: Settings, dtype: str, ranks: int, deadline: float) -> tuple[list[list[int]], float]:
    """Greedy tokens, and milliseconds a step."""
    batch, length, steps = (2, 16, 8) if settings.is_tiny else (16, 128, 32)
    prompts = make_prompts(settings.config(settings.size), batch, length, seed=1)
    threads = max(1, settings.threads // ranks)
    setup = Setup(settings.checkpoint(settings.size), dtype, threads, settings.device, ranks=ranks)
    with Worker(OURS, setup, deadline=deadline) as worker:
        worker.call("generate", prompts, 6)
        made = worker.call("generate", prompts, steps + 1)
    return made.tokens, made.milliseconds_a_step
