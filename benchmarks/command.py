"""The arguments of `tools/benchmark.py`. A user's mistake ends it with one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from opt_megatron.cli import Parser, run_and_exit
from opt_megatron.config import OPTConfig, released_config, released_name
from opt_megatron.errors import UserError

from .machine import usable_cores
from .options import BenchmarkOptions
from .systems import DTYPES, OURS, SYSTEMS
from .workload import QUICK, WORKLOADS, WorkloadSizes

_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DESCRIPTION = (
    "Measure this project against transformers and CTranslate2 on the same random weights: alternating runs on the "
    "same threads, outputs compared. Prints a table, writes benchmark.json and benchmark.png, and prints the JSON "
    "once more as its last line. Hours with the defaults; see --quick."
)


def main(argv: list[str] | None = None) -> NoReturn:
    """Measure, and end the process with its exit code."""
    from .session import run

    def measure() -> None:
        run(parse(sys.argv[1:] if argv is None else argv))

    run_and_exit("benchmark.py", measure)


def parse(argv: list[str]) -> BenchmarkOptions:
    """The options that the arguments give.

    Raises:
        UserError: one of them cannot be used.
    """
    args = _parser().parse_args(argv)
    device, quick = args.device, args.quick
    workload_sizes = QUICK if quick else WorkloadSizes()
    if args.requests is not None:
        workload_sizes = replace(workload_sizes, requests=args.requests)
    peers = _words(args.peers, [name for name in SYSTEMS if name != OURS], "--peers")
    if device == "cuda":
        peers = [peer for peer in peers if peer == "transformers"]
    return BenchmarkOptions(
        sizes=dict(_size(word) for word in args.sizes or (["125m"] if quick else ["125m", "1.3b"])),
        dtypes=tuple(_DTYPE_NAMES.get(word, word) for word in args.dtypes or DTYPES[device]),
        workloads=tuple(_words(args.workloads, list(WORKLOADS), "--workloads")),
        systems=(OURS, *peers),
        workload_sizes=workload_sizes,
        threads=usable_cores() if args.threads is None else args.threads,
        repeats=(2 if quick else 5) if args.repeats is None else args.repeats,
        mixed_repeats=(1 if quick else 3) if args.mixed_repeats is None else args.mixed_repeats,
        poisson_rate=args.poisson_rate,
        device=device,
        seed=args.seed,
        output=Path(args.output).expanduser(),
        force=args.force,
        work_dir=Path(args.work_dir).expanduser() if args.work_dir else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmark.py", description=_DESCRIPTION)
    what = parser.add_argument_group("what is measured (all by default)")
    what.add_argument(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help="released sizes (125m ... 175b), or config.json files of others; default: 125m 1.3b",
    )
    what.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="fp32 int8; with --device cuda: fp32 bf16 fp16")
    what.add_argument("--workloads", nargs="+", metavar="WORKLOAD", help=" ".join(WORKLOADS))
    what.add_argument("--peers", nargs="*", metavar="PEER", help="transformers ctranslate2")
    what.add_argument("--requests", type=int, metavar="N", help="of the mixed workload; default: 64")
    what.add_argument("--quick", action="store_true", help="125m, smaller workloads and few repeats: minutes")
    how = parser.add_argument_group("how")
    how.add_argument("--threads", type=int, metavar="N", help="of every system; default: all that the process may use")
    how.add_argument(
        "--device",
        choices=tuple(DTYPES),
        default="cpu",
        help="default: cpu. cuda has transformers as its only peer, and has NOT YET BEEN RUN on a GPU",
    )
    how.add_argument("--repeats", type=int, metavar="N", help="of every short run; default: 5")
    how.add_argument("--mixed-repeats", type=int, metavar="N", help="of every stream of requests; default: 3")
    how.add_argument(
        "--poisson-rate",
        type=float,
        metavar="R",
        help="requests a second; default: as many as this project serves when all arrive at once",
    )
    how.add_argument("--seed", type=int, default=1, help="of prompts, lengths and arrivals; default: 1")
    _add_files(parser)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--output", default="benchmark", metavar="DIR", help="default: ./benchmark")
    files.add_argument("--force", action="store_true", help="replace a result that is there")
    files.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep the random models here for the next run (1.3b: 12 GB); default: a temporary directory",
    )


def _words(given: list[str] | None, known: list[str], argument: str) -> list[str]:
    """The known words that were given, in the order of the known ones; all when nothing was given."""
    strange = [word for word in given or () if word not in known]
    if strange:
        raise UserError(f"{argument}: {strange[0]!r} is not one of {', '.join(known)}")
    return [word for word in known if given is None or word in given]


def _size(word: str) -> tuple[str, OPTConfig]:
    path = Path(word).expanduser()
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        return path.resolve().parent.name, OPTConfig.from_file(path)
    return released_name(word) or word, released_config(word)
