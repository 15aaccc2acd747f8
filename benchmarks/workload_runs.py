"""How each workload is measured, with all systems of one model and dtype loaded: functions that give result rows.

A row is a dictionary for the JSON: what was measured, and under `systems` for each system the median, the
lowest and highest, all samples, and the ratio of its median to this project's. Lower is better in all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opt_megatron.config import OPTConfig

from .measure import alternate, cache_bytes, percentile, spread, weight_bytes
from .options import BenchmarkOptions
from .report import ResultRow
from .static_batching import ServingResult, Tokens
from .worker import Worker
from .workload import PromptTokens, WorkloadRequest, make_prompts, make_requests, poisson_arrivals


@dataclass(frozen=True)
class Group:
    """The systems that are measured against each other; the first is this project."""

    options: BenchmarkOptions
    name: str
    config: OPTConfig
    dtype: str
    workers: dict[str, Worker]

    @property
    def ours(self) -> str:
        """The system that the others are compared with."""
        return next(iter(self.workers))

    def prompts(self, rows: int, tokens: int, label: object = "") -> list[PromptTokens]:
        """Prompts for this model; other ones for every label."""
        return make_prompts(self.config, rows, tokens, self.options.seed, str(label))

    def alternate(
        self, measure: Callable[[Worker, int], dict[str, float]], repeats: int | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """`measure(worker, round)` for each in turn; metric -> system -> samples."""
        runs = {system: partial(measure, worker) for system, worker in self.workers.items()}
        return alternate(runs, repeats or self.options.repeats, self.options.settle_seconds)

    def warm_up(self, rows: int, tokens: int) -> None:
        """Run every system once at this size, so that no sample includes work that is done only once."""
        for worker in self.workers.values():
            worker.call("generate", self.prompts(rows, tokens, "warm-up"), 2)

    def row(self, workload: str, case: str, metric: str, samples: dict[str, list[float]], **more: Any) -> ResultRow:
        """One line of the table."""
        return make_row(self.name, self.dtype, workload, case, metric, samples) | more


def make_row(
    size: str, dtype: str, workload: str, case: str, metric: str, samples: dict[str, list[float]]
) -> ResultRow:
    """One line of the table; `samples` begins with this project's."""
    systems = {system: spread(values) for system, values in samples.items()}
    ours = next(iter(systems.values()))["median"]
    for values in systems.values():
        values["ratio"] = values["median"] / ours
    kind = {"size": size, "dtype": dtype, "workload": workload, "case": case, "metric": metric}
    return kind | {"systems": systems}


def equality(group: Group) -> dict[str, Any]:
    """Whether all systems generate the same greedy tokens."""
    rows, length, new_tokens = group.options.workload_sizes.equality
    prompts = group.prompts(rows, length)
    tokens = {system: worker.call("generate", prompts, new_tokens).tokens for system, worker in group.workers.items()}
    return compared(group, f"{rows} prompts of {length} tokens, {new_tokens} new", tokens)


def compared(group: Group, what: str, tokens: dict[str, list[Tokens]]) -> dict[str, Any]:
    """How many of each system's tokens equal this project's; after a first difference all later ones may differ."""
    ours = tokens[group.ours]
    systems = {}
    for system, theirs in tokens.items():
        if system != group.ours:
            pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
            systems[system] = {
                "equal": sum(a == b for a, b in pairs),
                "tokens": len(pairs),
                "equal_rows": sum(mine == other for mine, other in zip(ours, theirs, strict=True)),
                "rows": len(ours),
            }
    return {"size": group.name, "dtype": group.dtype, "what": what, "systems": systems}


def prefill(group: Group) -> Iterator[ResultRow]:
    """Time of a whole call that generates one token."""
    for rows, length in group.options.workload_sizes.prefill:

        def measure(worker: Worker, number: int, rows: int = rows, length: int = length) -> dict[str, float]:
            return {"ms": worker.call("generate", group.prompts(rows, length, number), 1).seconds * 1e3}

        group.warm_up(rows, length)
        samples = group.alternate(measure)["ms"]
        rates = _rates(samples, rows * length)
        yield group.row("prefill", f"{rows} x {length} tokens", "ms", samples, tokens_per_second=rates)


def decode(group: Group) -> Iterator[ResultRow]:
    """Time of a step, by the number of rows."""
    for rows in group.options.workload_sizes.decode_batches:
        yield decode_row(group, "decode", rows)


def decode_row(group: Group, workload: str, rows: int) -> ResultRow:
    """Time of a step: the difference between a run of N + 1 and one of 1 new tokens, divided by N."""
    steps, length = group.options.workload_sizes.decode_steps, group.options.workload_sizes.decode_prompt

    def measure(worker: Worker, number: int) -> dict[str, float]:
        long = worker.call("generate", group.prompts(rows, length, f"{number} long"), steps + 1)
        short = worker.call("generate", group.prompts(rows, length, f"{number} short"), 1)
        return {"ms": (long.seconds - short.seconds) / steps * 1e3}

    group.warm_up(rows, length)
    samples = group.alternate(measure)["ms"]
    limit = weight_bytes(group.config, group.dtype)
    rates = _rates(samples, rows)
    return group.row(workload, f"batch {rows}", "ms", samples, limit_bytes=limit, tokens_per_second=rates)


def context(group: Group) -> Iterator[ResultRow]:
    """Time of a step of one row, by the tokens before it.

    From the first new token to the last within one run: the difference of two runs would be lost in the noise of a
    prompt of 2000 tokens. (Both ways agree where both can be measured.)
    """
    steps = group.options.workload_sizes.context_steps
    for length in group.options.workload_sizes.contexts:

        def measure(worker: Worker, number: int, length: int = length) -> dict[str, float]:
            made = worker.call("generate", group.prompts(1, length, number), steps + 1)
            return {"ms": made.milliseconds_a_step}

        group.warm_up(1, length)
        samples = group.alternate(measure)["ms"]
        cache = cache_bytes(group.config, group.dtype, length + steps // 2, group.options.device)
        limit = weight_bytes(group.config, group.dtype) + cache
        yield group.row("context", f"{length} tokens", "ms", samples, limit_bytes=limit, cache_bytes=cache)


def training(group: Group) -> Iterator[ResultRow]:
    """Time of a training step, and how far the losses of the first one are apart."""
    rows, length = group.options.workload_sizes.training
    losses: dict[Worker, float] = {}

    def measure(worker: Worker, number: int) -> dict[str, float]:
        batch = [list(row) for row in group.prompts(rows, length + 1, number)]
        return {"ms": worker.call("step", batch).seconds * 1e3}

    first = [list(row) for row in group.prompts(rows, length + 1, "warm-up")]
    losses |= {worker: worker.call("step", first).loss for worker in group.workers.values()}
    samples = group.alternate(measure)["ms"]
    ours = losses[group.workers[group.ours]]
    apart = {system: abs(losses[worker] - ours) for system, worker in group.workers.items()}
    rates = _rates(samples, rows * length)
    yield group.row(
        "training", f"{rows} x {length} tokens", "ms", samples, tokens_per_second=rates, loss=ours, loss_apart=apart
    )


def _rates(milliseconds: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Tokens a second of each system, by its median."""
    return {system: tokens / statistics.median(values) * 1e3 for system, values in milliseconds.items()}


class ServingRuns:
    """The mixed workload, all requests at once and as a Poisson stream."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._count = group.options.workload_sizes.requests
        self._at_once = [0.0] * self._count
        self._ours_per_second: float | None = None
        self.tuned: dict[str, dict[str, float]] = {}
        self.equality: list[dict[str, Any]] = []

    def warm_up(self) -> None:
        """Let every system serve a few short requests, and find its best parameters."""
        requests = self._requests("tune")
        short = [replace(request, new_tokens=4) for request in requests[:4]]
        for system, worker in self._group.workers.items():
            worker.call("serve", short, self._at_once[:4])
            if tuned := worker.call("tune", requests):
                self.tuned[system] = tuned

    def mixed(self) -> Iterator[ResultRow]:
        """All requests at once: time until the last one is done."""
        samples = self._serve("all at once", self._at_once)["all done"]
        self._ours_per_second = self._count / statistics.median(samples[self._group.ours])
        useful = sum(request.new_tokens for request in self._requests("tokens"))
        rates = {system: useful / statistics.median(values) for system, values in samples.items()}
        yield self._group.row("mixed", "all at once", "all done, s", samples, tokens_per_second=rates)

    def poisson(self) -> Iterator[ResultRow]:
        """A Poisson stream: time from a request's arrival until it is done, and until the last one is."""
        rate = self._group.options.poisson_rate or self._ours_per_second or self._measure_rate()
        arrivals = poisson_arrivals(self._count, rate, self._group.options.seed)
        case = f"{rate:.3g} a second"
        more = {"rate": rate, "last_arrival": arrivals[-1]}
        for metric, samples in self._serve(case, arrivals).items():
            yield self._group.row("poisson", case, f"{metric}, s", samples, **more)

    def _requests(self, label: object) -> list[WorkloadRequest]:
        return make_requests(
            self._group.config, self._group.options.workload_sizes, self._group.options.seed, str(label)
        )

    def _measure_rate(self) -> float:
        """The requests per second that this project serves when all arrive at once."""
        worker = self._group.workers[self._group.ours]
        return self._count / worker.call("serve", self._requests("rate"), self._at_once).seconds

    def _serve(self, case: str, arrivals: list[float]) -> dict[str, dict[str, list[float]]]:
        tokens: dict[Worker, list[Tokens]] = {}

        def measure(worker: Worker, number: int) -> dict[str, float]:
            served: ServingResult = worker.call("serve", self._requests(number), arrivals)
            tokens[worker] = served.tokens
            waits = [done - arrival for done, arrival in zip(served.finished, arrivals, strict=True)]
            return {
                "median wait": statistics.median(waits),
                "95% wait": percentile(waits, 95),
                "all done": served.seconds,
            }

        samples = self._group.alternate(measure, self._group.options.mixed_repeats)
        last = {system: tokens[worker] for system, worker in self._group.workers.items()}
        self.equality.append(compared(self._group, f"mixed workload, {case}", last))
        return samples
