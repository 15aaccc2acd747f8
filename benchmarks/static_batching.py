"""Serving a stream of requests with a system that runs whole batches: a batch begins when a worker is free.

This project's engine lets requests join and leave a running batch and needs none of this. The measure is
the same for all: when each request had all its tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .workload import WorkloadRequest

Tokens = list[int]
Mark = Callable[[int], None]  # mark(row): this row of the batch has all its tokens now
RunBatch = Callable[[list[WorkloadRequest], Mark], list[Tokens]]


@dataclass
class ServingResult:
    """The outcome of a stream of requests.

    Attributes:
        finished: seconds from the start until each request had its last token.
        tokens: each request's new tokens.
    """

    finished: list[float]
    tokens: list[Tokens]

    @property
    def seconds(self) -> float:
        """From the start until the last request was done."""
        return max(self.finished)


@dataclass
class StepClock:
    """When each step's tokens were available, in seconds since `start` (the last row of a batch counts)."""

    start: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)

    def tick(self, step: int) -> None:
        """Note that a row has received token number `step` (from 0)."""
        now = time.perf_counter() - self.start
        if step == len(self.times):
            self.times.append(now)
        else:
            self.times[step] = now


def serve_in_batches(
    requests: list[WorkloadRequest],
    arrivals: list[float],
    run_batch: RunBatch,
    *,
    batch_size: int,
    workers: int = 1,
    rank: Callable[[WorkloadRequest], float] = lambda request: 0,
) -> ServingResult:
    """Serve all requests, none of them before its arrival (seconds from now).

    A worker that is free runs the oldest waiting requests, at most `batch_size`; of those that arrived at the
    same moment, the ones with the lowest `rank`. It waits only while there are none.
    """
    queue = _ArrivalQueue(requests, arrivals, batch_size, rank)
    served = ServingResult([0.0] * len(requests), [[] for _ in requests])
    start = time.perf_counter()

    def work() -> None:
        while batch := queue.next_batch(start):

            def mark(row: int, batch: list[int] = batch) -> None:
                served.finished[batch[row]] = time.perf_counter() - start

            for index, tokens in zip(batch, run_batch([requests[n] for n in batch], mark), strict=True):
                served.tokens[index] = tokens

    if workers == 1:
        work()
    else:
        with ThreadPoolExecutor(workers) as pool:
            for running in [pool.submit(work) for _ in range(workers)]:
                running.result()
    return served


class _ArrivalQueue:
    """Requests in the order in which they are served."""

    def __init__(
        self,
        requests: list[WorkloadRequest],
        arrivals: list[float],
        batch_size: int,
        rank: Callable[[WorkloadRequest], float],
    ) -> None:
        self._arrivals = arrivals
        self._order = sorted(range(len(requests)), key=lambda n: (arrivals[n], rank(requests[n])))
        self._batch_size = batch_size
        self._lock = threading.Lock()

    def next_batch(self, start: float) -> list[int]:
        """The next batch as indices of requests; waits for one to arrive, and is empty after the last one."""
        with self._lock:
            if not self._order:
                return []
            # A worker that waits here keeps the lock: another could only wait for the same request.
            time.sleep(max(0.0, self._arrivals[self._order[0]] - (time.perf_counter() - start)))
            now = time.perf_counter() - start
            arrived = sum(self._arrivals[n] <= now for n in self._order[: self._batch_size])
            batch, self._order = self._order[: max(1, arrived)], self._order[max(1, arrived) :]
            return batch
