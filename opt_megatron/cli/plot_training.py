"""opt-megatron plot-training: loss curves of several runs to PNG."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..options import Options, option
from ..training.plot_curves import MEASURES
from .arguments import check_picture
from .option_groups import Groups, add_groups

HELP = "draw loss curves (or another measure) of training runs to PNG"
EXAMPLE = "opt-megatron plot-training runs/a runs/b --output loss.png"


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """The runs, the measure, and the picture to write."""

    runs: tuple[str, ...] = option(
        help="directories that train --save has written", positional=True, nargs="+", metavar="RUN"
    )
    output: str = option(help="the picture", metavar="FILE.png", required=True, is_path=True)
    measure: str = option(
        "loss",
        help="what is drawn",
        choices=MEASURES,
    )
    force: bool = option(False, help="replace the file")


OPTIONS: Groups = {"": (PlotOptions,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS)


def run(args: argparse.Namespace) -> None:
    """Read the curves, draw them, and print the name of the file.

    Raises:
        UserError: a run does not have the measure, or the file exists and --force is not given.
    """
    from ..training.plot_curves import plot_curves, read_curve

    output = Path(args.output)
    check_picture(output, args.force)
    plot_curves([read_curve(Path(name), args.measure) for name in args.runs], args.measure, output)
    print(output)
