"""opt-megatron convert: write a checkpoint for a tensor x pipeline parallel layout."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .arguments import add_layout, add_load

HELP = "write a checkpoint in Megatron-LM's layout for any tensor x pipeline parallel size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_load(parser, required=True)
    parser.add_argument("--save", required=True, metavar="DIR", help="the directory to write")
    add_layout(parser)
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: every tensor stays as it is stored")
    parser.add_argument("--force", action="store_true", help="replace --save where it is a checkpoint already")


def run(args: argparse.Namespace) -> None:
    """Convert, with a progress bar in bytes, and say what was written.

    Raises:
        UserError: of any kind; nothing is left at the target then.
    """
    from tqdm import tqdm

    from ..checkpoint.convert import convert
    from ..checkpoint.locate import locate

    started, written = time.monotonic(), 0
    with tqdm(desc="writing", unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def progress(num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            bar.update(num_bytes)

        convert(
            locate(args.load, args.revision),
            Path(args.save).expanduser(),
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            dtype=args.dtype,
            force=args.force,
            progress=progress,
        )
    layout = f"TP{args.tensor_model_parallel_size} x PP{args.pipeline_model_parallel_size}"
    print(f"wrote {args.save}: Megatron {layout}, {written / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
