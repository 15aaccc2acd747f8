"""Load on a running server: latencies, errors, memory, and whether every answer is the offline engine's.

python tools/load_test.py --url http://127.0.0.1:5000 --streams 200 --seconds 60 --process PID --load story
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from opt_megatron.cli import Parser, run_and_exit
from opt_megatron.errors import UserError

from .load_client import LoadClient, LoadRequest, LoadResult, keep_streams

PROMPTS = (
    "Once upon a time",
    "The king had a daughter",
    "In the middle of the forest stood a little house, and in it lived",
    "There was once a poor woodcutter who",
    '"Who is there?" cried the old woman. "It is only I," said',
    "The youngest brother went out into the wide world, and when he had gone a long way he came to",
)
_PERCENTILES = (50, 90, 99)
_SECONDS_BETWEEN_SAMPLES = 0.5


def main(argv: list[str] | None = None) -> NoReturn:
    """Measure, and end the process with its exit code."""
    run_and_exit("load_test.py", lambda: run(_parser().parse_args(sys.argv[1:] if argv is None else argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:5000", help="default: http://127.0.0.1:5000")
    parser.add_argument("--streams", type=int, default=200, metavar="N", help="at a time; default: 200")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="default: 60")
    parser.add_argument("--requests", type=int, default=1_000_000, metavar="N", help="end after so many")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each answer; default: 64")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="default: 0.8")
    parser.add_argument(
        "--process",
        type=int,
        action="append",
        default=[],
        metavar="PID",
        help="a rank of the server: its memory is watched; repeatable",
    )
    parser.add_argument("--load", metavar="CHECKPOINT", help="compare with the offline engine on this model")
    parser.add_argument("--check", type=int, default=1000, metavar="N", help="answers that are compared; default: 1000")
    parser.add_argument("--api-key", metavar="KEY")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure and print: a table for people, and the same as JSON in the last line."""
    for name in ("streams", "seconds", "requests", "max_tokens"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name):g}, but must be above 0")
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    client = LoadClient(args.url, options, args.api_key)
    count = min(args.requests, 1_000_000)
    requests = [LoadRequest(PROMPTS[number % len(PROMPTS)], number) for number in range(count)]
    begun = time.perf_counter()
    results, memory = asyncio.run(_under_load(client, requests, args))
    report = summary(results, time.perf_counter() - begun, memory)
    if args.load is not None:
        report["offline"] = _compared(results, args)
    print(table(report))
    print(json.dumps(report))


async def _under_load(
    client: LoadClient, requests: list[LoadRequest], args: argparse.Namespace
) -> tuple[list[LoadResult], list[tuple[int, float]]]:
    done: asyncio.Queue[int] = asyncio.Queue()
    memory: list[tuple[int, float]] = []
    watch = asyncio.create_task(_watch(args.process, done, memory))
    results = await keep_streams(client, requests, args.streams, args.seconds, done)
    watch.cancel()
    return results, memory


async def _watch(processes: list[int], done: asyncio.Queue[int], memory: list[tuple[int, float]]) -> None:
    """Record regularly how many requests have ended and how many MB all processes use."""
    ended = 0
    while processes:
        while not done.empty():
            ended = done.get_nowait()
        memory.append((ended, sum(map(_resident, processes))))
        await asyncio.sleep(_SECONDS_BETWEEN_SAMPLES)


def _resident(process: int) -> float:
    """Resident memory of a process in MB."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        raise UserError(f"--process {process}: there is no such process (any more)") from None
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6


def summary(results: list[LoadResult], seconds: float, memory: list[tuple[int, float]]) -> dict[str, Any]:
    """The report of a run: counts, latencies in seconds, memory in MB."""
    good = [result for result in results if result.error is None]
    tokens = sum(len(result.times) for result in good)
    report: dict[str, Any] = {
        "requests": len(results),
        "statuses": dict(Counter(str(result.status) for result in results)),
        "errors": dict(Counter(result.error for result in results if result.error is not None)),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": percentiles([result.times[0] for result in good if result.times]),
        "inter_token_latency": percentiles([gap for result in good for gap in result.gaps]),
        "whole_request": percentiles([result.times[-1] for result in good if result.times]),
    }
    if memory:  # after a tenth of the requests: before that, buffers are still growing
        settled = [megabytes for ended, megabytes in memory if ended >= len(results) // 10] or [memory[-1][1]]
        report["memory"] = {"first": memory[0][1], "settled": settled[0], "last": settled[-1], "most": max(settled)}
    return report


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of the values, each one of them; {} without values."""
    ordered = sorted(values)
    return {f"p{p}": ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in _PERCENTILES} if ordered else {}


def _compared(results: list[LoadResult], args: argparse.Namespace) -> dict[str, int]:
    """How many texts equal those that the engine generates offline for the same prompts and seeds."""
    from opt_megatron.generation.core.engine import Engine
    from opt_megatron.generation.request import Request
    from opt_megatron.generation.sampling.sampling_params import SamplingParams
    from opt_megatron.parallel.context import init_parallel
    from opt_megatron.pretrained import open_pretrained

    pretrained = open_pretrained(args.load, init_parallel(device="cpu"))
    engine = Engine(pretrained.load_model(), pretrained.parallel, suppress_tokens=pretrained.suppress_tokens)
    checked = [result for result in results if result.error is None][: args.check]
    tokenizer = pretrained.require_tokenizer()
    requests = [
        Request(
            tuple(tokenizer.encode(result.request.prompt)),
            SamplingParams(max_new_tokens=args.max_tokens, temperature=args.temperature, seed=result.request.seed),
            tokenizer.stream,
        )
        for result in checked
    ]
    texts = [completion.text for completion in engine.complete(requests)]
    equal = sum(text == result.text for text, result in zip(texts, checked, strict=True))
    return {"compared": len(checked), "equal": equal}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{report['requests']} requests in {report['seconds']:.1f} s, statuses {report['statuses']}, "
        f"{len(report['errors'])} kinds of errors; {report['tokens_per_second']:.0f} tokens a second",
        "",
        "| ms | " + " | ".join(f"p{p}" for p in _PERCENTILES) + " |",
        "|---|" + "---|" * len(_PERCENTILES),
    ]
    for name in ("time_to_first_token", "inter_token_latency", "whole_request"):
        values = report[name].values()
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(f"{1000 * value:.1f}" for value in values) + " |")
    lines += [f"error: {message} ({count} times)" for message, count in report["errors"].items()]
    if "memory" in report:
        lines.append("memory, MB: " + ", ".join(f"{name} {value:.0f}" for name, value in report["memory"].items()))
    if "offline" in report:
        lines.append("equal to the offline engine: {equal} of {compared}".format(**report["offline"]))
    return "\n".join(lines)
