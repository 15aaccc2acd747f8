"""Jobs that ranks with simulated GPUs run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import training_jobs
from cuda_simulator import graphs, traffic
from rank_jobs import start

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.parallel.context import ParallelContext, _leave_model_parallel_groups, init_parallel

PROMPT = 3  # tokens
SHORT, LONG = 4, 6  # tokens of two generations whose difference are decode steps of an unchanged batch


def traffic_of_a_step(
    directory: Path, batches: list[int], options: dict[str, Any], cuda_graphs: str = "off"
) -> list[dict[str, float]]:
    """Of each batch's decode steps, in the mean: kernels and their sum, reads that block or do not, and uploads.

    Prompts and the first steps do not count: it is the difference of two generations of different length.
    """
    parallel = start(1, 1)
    model = load_model(directory, None, parallel, "float16")
    engine = Engine(model, parallel, max_batch_size=max(batches), cuda_graphs=cuda_graphs)
    found = []
    for batch in batches:
        counts = []
        engine.complete(_requests(batch, SHORT, options))  # where there are graphs, they are captured here
        for length in (SHORT, LONG):
            with traffic.counting() as counted:
                engine.complete(_requests(batch, length, options))
            counts.append(counted)
        short, long = counts
        kernels = _mean(long.kernels, short.kernels)
        transfers = _mean(long.transfers, short.transfers)
        found.append(
            {
                "kernels": kernels,
                "launches": sum(kernels.values()),
                "blocking reads": transfers.get(traffic.READ, 0) + transfers.get(traffic.WAIT, 0),
                "uploads": transfers.get(traffic.UPLOAD, 0) + transfers.get(traffic.ASYNCHRONOUS_UPLOAD, 0),
                "asynchronous reads": transfers.get(traffic.ASYNCHRONOUS_READ, 0),
            }
        )
    return found


def _requests(batch: int, length: int, options: dict[str, Any]) -> list[Request]:
    params = [SamplingParams(max_new_tokens=length, ignore_eos=True, seed=n, **options) for n in range(batch)]
    return [Request((2, *range(40 + n, 39 + n + PROMPT)), params[n]) for n in range(batch)]


def _mean(long: Counter, short: Counter) -> dict[Any, float]:
    steps = LONG - SHORT
    return {what: (long[what] - short[what]) / steps for what in long if long[what] != short[what]}


def replayed(
    directory: Path, tp: int, batches: list[int], options: dict[str, Any]
) -> list[tuple[list[tuple[int, ...]], list[tuple[int, ...]], int, int]]:
    """Of each batch: tokens with CUDA graphs and without, how many graphs were captured and how often replayed.

    A capture that did anything on the host raises.
    """
    parallel = start(tp, 1)
    engines = [
        Engine(load_model(directory, None, parallel), parallel, max_batch_size=max(batches), cuda_graphs=choice)
        for choice in ("auto", "off")
    ]
    found = []
    for batch in batches:
        graphs.captured.clear()
        requests = _requests(batch, 5, options)
        with_graphs, without = ([c.tokens for c in engine.complete(requests)] for engine in engines)
        on_host = [graph.counts.host_operations for graph in graphs.captured]
        assert not any(on_host), on_host
        replays = sum(graph.num_replays for graph in graphs.captured)
        found.append((with_graphs, without, len(graphs.captured), replays))
    return found


def trained_on_the_cpu(directory: Path, iterations: int, changes: dict[str, Any]) -> tuple[list[float], dict[str, int]]:
    """The losses of a run with --device cpu on a machine with a GPU, and what went to the GPU meanwhile."""
    with (
        _only_process("cpu") as parallel,
        mock.patch.object(training_jobs, "start", lambda tp, pp: parallel),
        traffic.counting() as counts,
    ):
        losses = training_jobs.loss_curve(directory, 1, 1, iterations, changes)
    return losses, dict(counts.kernels + counts.transfers)


@contextmanager
def _only_process(device: str) -> Iterator[ParallelContext]:
    """A torch.distributed for another device, instead of this rank's."""
    _restart_distributed()
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with mock.patch.dict(os.environ, alone, clear=True):
        yield init_parallel(seed=1, device=device)
    _restart_distributed()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)


def _restart_distributed() -> None:
    _leave_model_parallel_groups()
    dist.destroy_process_group()


def rules_of_the_device() -> dict[str, str]:
    """What the simulated device says to a few mistakes, each a name."""
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    mistakes: dict[str, Callable[[], Any]] = {
        "two devices": lambda: here + there,
        "index": lambda: there.index_select(0, torch.tensor([0])),
        "generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        "numpy": there.numpy,
        "nccl": lambda: dist.all_reduce(here),
        "read in a graph": lambda: _captured(graph, there.tolist),
        "upload in a graph": lambda: _captured(graph, lambda: torch.tensor([1, 2], device="cuda")),
        "decision in a graph": lambda: _captured(graph, lambda: bool(there.sum() > 1)),
    }
    said = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
            said[name] = ""
        except (RuntimeError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    traffic.take_violations()
    return said


def _captured(graph: Any, function: Callable[[], Any]) -> Any:
    with torch.cuda.graph(graph):
        return function()


def replays_of_a_graph() -> tuple[list[float], list[list[float]], list[float]]:
    """A counter after its step was captured, and after each of two replays; and a product of it by a changed factor."""
    counter, factor, graph = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()

    def step() -> torch.Tensor:
        counter.add_(1)
        return counter[:1] * factor[:1]

    product = _captured(graph, step)
    captured, replayed = counter.tolist(), []
    for _ in range(2):
        graph.replay()
        replayed.append(counter.tolist())
    factor.fill_(10)
    graph.replay()
    return captured, replayed, product.tolist()


def counts_of_a_few_lines() -> tuple[int, int, int]:
    """Launches, blocking reads and blocking uploads of two kernels, three reads and an upload."""
    there = torch.ones(4, device="cuda")
    with traffic.counting() as counts:
        total = (there * 2).sum()
        total.item(), total.cpu(), there.tolist()
        total.to("cpu", non_blocking=True)
        torch.ones(4).to("cuda")
        torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    return counts.launches, counts.blocking_reads, counts.uploads


def transfers_of_a_training_step(directory: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Of each training step after the first: reads and uploads, by kind."""
    counts = []
    for length in (2, 4):  # the first step makes the moments, and the last one has no next batch
        with traffic.counting() as counted:
            training_jobs.loss_curve(directory, 1, 1, length, changes)
        counts.append(counted.transfers)
    return {kind: number / 2 for kind, number in (counts[1] - counts[0]).items()}
