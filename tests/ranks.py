"""Real ranks for tests: processes that stay, connected over gloo, and run one function after another.

    results = ranks(2).run(function, argument, ...)       # a list with what each rank returned

Functions must be importable (`rank_jobs.py`). A world is started once per session, and its ranks are forks of one
process that has imported the jobs: importing Megatron-core takes seconds, a job milliseconds.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from typing import Any

TIMEOUT = 180  # seconds a job may take


class RankFailure(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """`world_size` processes, each a rank of one torch.distributed world on gloo.

    Args:
        has_gpus: each rank has a simulated GPU; they are no forks then, since torch is imported after the simulator.
    """

    def __init__(self, world_size: int, *, has_gpus: bool = False) -> None:
        context = get_context("spawn") if has_gpus else forkserver()
        serve = _serve_with_gpus if has_gpus else _serve
        from torch.distributed import TCPStore  # here: a rank with a simulated GPU imports this module before torch

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes, self._pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, world_size, self._store.port, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank at once and return what each gave."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = [self._answer(rank, pipe) for rank, pipe in enumerate(self._pipes)]
        failures = [text for kind, text in results if kind == "error"]
        if failures:
            raise RankFailure("\n".join(failures))
        return [value for _, value in results]

    def _answer(self, rank: int, pipe: Any) -> tuple[str, Any]:
        if not pipe.poll(TIMEOUT):
            self.close()
            raise RankFailure(f"rank {rank} did not answer within {TIMEOUT} s")
        return pipe.recv()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def forkserver() -> ForkServerContext:
    """Processes that are forked from one which has imported the jobs, and has no threads of torch's yet."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["rank_jobs", "torch_dist_jobs", "training_jobs"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # what is imported there is looked for there alone
    ensure_running()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return context


def _serve_with_gpus(rank: int, world_size: int, store_port: int, pipe: Any) -> None:
    from cuda_simulator.installation import install  # before torch

    install(devices=world_size)
    from cuda_simulator.traffic import take_violations

    def check() -> None:
        assert not (found := take_violations()), found

    _serve(rank, world_size, store_port, pipe, "nccl", check)


def _serve(
    rank: int,
    world_size: int,
    store_port: int,
    pipe: Any,
    backend: str = "gloo",
    check: Callable[[], None] = lambda: None,
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", store_port)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*args)
            check()
            pipe.send(("value", result))
        except Exception:
            pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
