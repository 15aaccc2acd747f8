"""The arguments of `tools/check_gpu.py`. Exit code 2: a user's mistake, told in one line; 1: a check has failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from opt_megatron.cli import Parser, run_and_exit
from opt_megatron.errors import UserError

from ..machine import usable_cores
from .run import SECTIONS, run
from .settings import SIZES, Settings
from .table import format_table

_DESCRIPTION = (
    "Check in 8 minutes whether this project computes on this machine's GPUs what transformers and the CPU compute, "
    "and how fast: writes a JSON and prints a table. Needs torch, megatron-core and this project; transformers is "
    "compared with where it is installed. Exit code 0: all checks passed; 1: some failed."
)


def main(argv: list[str] | None = None) -> NoReturn:
    """Check, and end the process with its exit code."""
    passed = True

    def check() -> None:
        nonlocal passed
        passed = _check(_parser().parse_args(sys.argv[1:] if argv is None else argv))

    try:
        run_and_exit("check_gpu.py", check)
    except SystemExit as end:
        sys.exit(end.code or int(not passed))


def _check(args: argparse.Namespace) -> bool:
    """Whether all checks passed.

    Raises:
        UserError: there is no GPU, or the file is there already.
    """
    path = Path(args.output)
    if path.exists() and not args.force:
        raise UserError(f"{path} exists: choose another --output, or replace it with --force")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a directory: choose another --output")
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as directory:
        settings = Settings(
            args.device,
            _num_devices(args.device),
            Path(directory),
            size=args.size,
            is_tiny=args.tiny,
            threads=1 if args.tiny else usable_cores(),
        )
        result = run(settings, [name for name in SECTIONS if name in args.only], args.seconds, path)
    print(format_table(result))
    print(f"written to {path}")
    return bool(result["passed"])


def _num_devices(device: str) -> int:
    """GPUs, or two processes that rehearse on the CPU."""
    if device == "cpu":
        return 2
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no CUDA GPU here; --device cpu --tiny rehearses the check with toy sizes"
        )
    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="check_gpu.py", description=_DESCRIPTION, example="tools/check_gpu.py --size 6.7b")
    parser.add_argument("--output", default="check_gpu.json", metavar="FILE", help="default: ./check_gpu.json")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--size", default=SIZES[0], choices=SIZES, help=f"of the large model; default: {SIZES[0]}")
    parser.add_argument("--seconds", type=float, default=480, help="for all sections; default: 480")
    sections = "; ".join(f"{name}: {section.help}" for name, section in SECTIONS.items())
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(SECTIONS),
        choices=list(SECTIONS),
        metavar="SECTION",
        help=f"some sections ({sections})",
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    return parser
