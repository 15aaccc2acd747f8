"""opt-megatron train-tokenizer: a byte-level BPE with OPT's special ids."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, print_notice
from ..options import Options, option
from .arguments import JsonLinesOptions
from .option_groups import Groups, add_groups

HELP = "train a byte-level BPE tokenizer with OPT's special ids on JSON lines"
EXAMPLE = "opt-megatron train-tokenizer --input corpus.jsonl --vocab-size 8192 --output tokenizer"


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingOptions(Options):
    """How many entries, and where they are written."""

    vocab_size: int = option(help="entries, 256 bytes and 4 special tokens included", required=True)
    output: str = option(
        help="the directory to write the tokenizer's files to", metavar="DIR", required=True, is_path=True
    )
    force: bool = option(False, help="replace a tokenizer that is in the directory already")


OPTIONS: Groups = {"": (JsonLinesOptions, TokenizerTrainingOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS)


def run(args: argparse.Namespace) -> None:
    """Train, write the files, and print what was written.

    Raises:
        UserError: the input cannot be used, or the output cannot be written; none of it is left.
    """
    from ..data.train_tokenizer import train_tokenizer

    if not args.output:
        raise UserError("--output is empty; is a shell variable unset?")
    result = train_tokenizer(
        args.input,
        Path(args.output),
        args.vocab_size,
        json_key=args.json_key,
        strict=args.strict,
        force=args.force,
        show_progress=sys.stderr.isatty(),
    )
    for line in result.bad.report():
        print_notice(line)
    if result.vocab_size < args.vocab_size:
        print_notice(
            f"the text holds no more pairs that occur twice: the vocabulary has {result.vocab_size} entries, "
            f"not {args.vocab_size}"
        )
    print(f"wrote {args.output}: {result.vocab_size:,} tokens")
    print(f"{result.texts:,} texts, {result.text_bytes:,} bytes in {result.seconds:.1f} s")
