"""opt-megatron convert: any checkpoint to any format and layout."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import add_config, add_layout, add_load, config_argument, say_derived, size_in_bytes

if TYPE_CHECKING:
    from ..checkpoint.conversion_options import ConversionOptions

HELP = "write a checkpoint in another format or for another tensor x pipeline parallel layout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_load(parser, required=True)
    parser.add_argument("--save", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--to", default="megatron", metavar="FORMAT", help="megatron, hf, metaseq or flagai; default: megatron"
    )
    add_layout(parser)
    parser.add_argument(
        "--decoder-first-pipeline-num-layers",
        type=int,
        metavar="N",
        help="layers of the first stage, if not as the others",
    )
    parser.add_argument(
        "--decoder-last-pipeline-num-layers",
        type=int,
        metavar="N",
        help="layers of the last stage, if not as the others",
    )
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: every tensor stays as it is stored")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file with --to hf; default: 5GB")
    add_config(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer files to copy beside; default: the source's")
    parser.add_argument("--force", action="store_true", help="replace --save where it is a checkpoint already")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of the same command stopped"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads that copy; default: 2")
    parser.add_argument(
        "--no-fsync", action="store_true", help="do not wait for the disk; a power failure may then leave holes"
    )


def run(args: argparse.Namespace) -> None:
    """Convert, with a progress bar in bytes, and say what was written.

    Raises:
        UserError: of any kind; nothing is left at the target then.
    """
    from ..checkpoint.convert import convert
    from ..checkpoint.locate import locate
    from ..files import progress_bar

    options = _options(args)
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, but must be at least 1")
    started = time.monotonic()
    with progress_bar("writing", unit="B", unit_scale=True, leave=True) as bar:

        def on_start(total: int) -> None:
            bar.total = total
            bar.refresh()

        summary = convert(
            locate(args.load, args.revision),
            _save_path(args.save),
            options,
            config=config_argument(args),
            tokenizer=None if args.tokenizer is None else locate(args.tokenizer),
            force=args.force,
            resume=args.resume,
            workers=args.workers,
            fsync=not args.no_fsync,
            on_start=on_start,
            progress=bar.update,
        )
    say_derived(summary.config_notes)
    for note in summary.notes:
        print(f"opt-megatron: {note}", file=sys.stderr)
    seconds = time.monotonic() - started
    files = f"{summary.num_files} file" + ("s" if summary.num_files > 1 else "")
    print(
        f"wrote {args.save}: {summary.target_format} from {summary.source_format}, {files}, "
        f"{summary.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    )


def _save_path(text: str) -> Path:
    if not text:
        raise UserError("--save is empty; is a shell variable unset?")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"--save {text}: {error}") from None


def _options(args: argparse.Namespace) -> ConversionOptions:
    from ..checkpoint.conversion_options import ConversionOptions

    return ConversionOptions(
        to=args.to,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        decoder_first_pipeline_num_layers=args.decoder_first_pipeline_num_layers,
        decoder_last_pipeline_num_layers=args.decoder_last_pipeline_num_layers,
        dtype=args.dtype,
        max_shard_bytes=size_in_bytes(args.max_shard_size),
    )
