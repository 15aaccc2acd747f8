"""opt-megatron preprocess: JSON lines to Megatron's indexed format."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from ..errors import UserError, print_notice
from ..options import Options, option
from .arguments import JsonLinesOptions
from .option_groups import Groups, add_groups

HELP = "turn JSON lines into the indexed token files (.bin, .idx) that training reads"
EXAMPLE = "opt-megatron preprocess --input corpus.jsonl --output-prefix data/corpus --tokenizer opt-125m"


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(Options):
    """How the texts become tokens, under Megatron-LM's names."""

    tokenizer: str = option(
        help="a tokenizer's directory, or a model's name as --load takes it", metavar="DIR", required=True, is_path=True
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub repository")
    output_prefix: str = option(help="writes P_KEY_document.bin and .idx", metavar="P", required=True, is_path=True)
    append_eod: bool = option(False, help="end each document with </s>, as OPT's recipe does")
    workers: int | None = option(None, help="processes that tokenise", minimum=1, default_text="one for each CPU")
    force: bool = option(False, help="replace the output files where they exist already")


OPTIONS: Groups = {"": (JsonLinesOptions, PreprocessOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS)


def run(args: argparse.Namespace) -> None:
    """Write the files, with a progress bar in bytes, and print what was written.

    Raises:
        UserError: the input or the tokenizer cannot be used, or the output cannot be written; none of it is left.
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
            args.output_prefix,
            json_key=args.json_key,
            append_eod=args.append_eod,
            workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
            strict=args.strict,
            force=args.force,
            progress=bar.update,
        )
    for line in result.bad.report():
        print_notice(line)
    megabytes = result.text_bytes / 1e6
    print(f"wrote {result.prefix}.bin and .idx ({result.dtype})")
    print(
        f"{result.documents:,} documents, {result.tokens:,} tokens, {result.text_bytes:,} bytes of text "
        f"in {result.seconds:.1f} s, {megabytes / result.seconds:,.1f} MB/s"
    )
