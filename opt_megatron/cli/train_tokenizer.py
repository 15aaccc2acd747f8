"""opt-megatron train-tokenizer: a byte-level BPE with OPT's special ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import UserError
from .arguments import add_json_lines

HELP = "train a byte-level BPE tokenizer with OPT's special ids on JSON lines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_json_lines(parser)
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="entries, 256 bytes and 4 special tokens included"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the directory to write the tokenizer's files to"
    )
    parser.add_argument("--force", action="store_true", help="replace a tokenizer that is in the directory already")


def run(args: argparse.Namespace) -> None:
    """Train, write, and say what was written.

    Raises:
        UserError: of any kind; no output is left then.
    """
    from ..data.train_tokenizer import train_tokenizer

    if not args.output:
        raise UserError("--output is empty; is a shell variable unset?")
    result = train_tokenizer(
        args.input,
        Path(args.output).expanduser(),
        args.vocab_size,
        json_key=args.json_key,
        strict=args.strict,
        force=args.force,
        show_progress=sys.stderr.isatty(),
    )
    for line in result.bad.report():
        print(f"opt-megatron: {line}", file=sys.stderr)
    if result.vocab_size < args.vocab_size:
        print(
            f"opt-megatron: the text holds no more pairs that occur twice: the vocabulary has {result.vocab_size} "
            f"entries, not {args.vocab_size}",
            file=sys.stderr,
        )
    print(f"wrote {args.output}: {result.vocab_size:,} tokens")
    print(f"{result.texts:,} texts, {result.text_bytes:,} bytes in {result.seconds:.1f} s")
