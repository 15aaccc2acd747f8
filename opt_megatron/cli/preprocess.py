"""opt-megatron preprocess: JSON lines to Megatron's indexed format."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import UserError
from .arguments import add_json_lines

HELP = "turn JSON lines into the indexed token files (.bin, .idx) that training reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments, under Megatron-LM's names."""
    add_json_lines(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="a tokenizer's directory, or a model's name as --load takes it",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx")
    parser.add_argument("--append-eod", action="store_true", help="end each document with </s>, as OPT's recipe does")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one for each CPU")
    parser.add_argument("--force", action="store_true", help="replace the output files where they exist already")


def run(args: argparse.Namespace) -> None:
    """Write the files, with a progress bar in bytes, and say what was written.

    Raises:
        UserError: of any kind; no output is left then.
    """
    from ..checkpoint.locate import locate
    from ..data.jsonl import check_inputs
    from ..data.preprocess import preprocess
    from ..files import progress_bar

    if not args.output_prefix:
        raise UserError("--output-prefix is empty; is a shell variable unset?")
    check_inputs(args.input)
    total = sum(os.stat(path).st_size for path in args.input)
    with progress_bar("reading", unit="B", unit_scale=True, total=total, leave=True) as bar:
        result = preprocess(
            args.input,
            locate(args.tokenizer, args.revision),
            str(Path(args.output_prefix).expanduser()),
            json_key=args.json_key,
            append_eod=args.append_eod,
            workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
            strict=args.strict,
            force=args.force,
            progress=bar.update,
        )
    for line in result.bad.report():
        print(f"opt-megatron: {line}", file=sys.stderr)
    megabytes = result.text_bytes / 1e6
    print(f"wrote {result.prefix}.bin and .idx ({result.dtype})")
    print(
        f"{result.documents:,} documents, {result.tokens:,} tokens, {result.text_bytes:,} bytes of text "
        f"in {result.seconds:.1f} s, {megabytes / result.seconds:,.1f} MB/s"
    )
