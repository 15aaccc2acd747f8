"""opt-megatron plot-training: loss curves of several runs to PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError

HELP = "draw loss curves (or another measure) of training runs to PNG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories that train --save has written")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument(
        "--measure",
        default="loss",
        choices=("loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "loss_scale"),
        help="default: loss",
    )
    parser.add_argument("--force", action="store_true", help="replace the file")


def run(args: argparse.Namespace) -> None:
    """Read, draw.

    Raises:
        UserError: a run has no such curve, or the file is there.
    """
    from ..training.plot import draw, read_curve

    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: only .png is written")
    if output.exists() and not args.force:
        raise UserError(f"{output}: is there already; use --force to replace it")
    draw([read_curve(Path(name), args.measure) for name in args.runs], args.measure, output)
    print(output)
