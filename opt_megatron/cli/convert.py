"""opt-megatron convert: writes any checkpoint in any format and layout."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.conversion_options import ConversionOptions
from ..errors import UserError, print_notice
from ..options import Options, from_arguments, option
from .arguments import ModelConfigOptions, RequiredLoadOptions, config_argument, print_config_notes
from .option_groups import Groups, add_groups

HELP = "write a checkpoint in another format or for another tensor x pipeline parallel layout"
EXAMPLE = "opt-megatron convert --load opt-13b --save checkpoints/opt-13b-tp2 --tensor-model-parallel-size 2"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Where a conversion writes, and how."""

    save: str = option(help="the directory to write", metavar="DIR", required=True, is_path=True)
    tokenizer: str | None = option(
        None, help="tokenizer files to copy", metavar="DIR", default_text="the source's", is_path=True
    )
    force: bool = option(False, help="replace --save where it is a checkpoint already")
    resume: bool = option(False, help="go on where an interrupted run of the same command stopped")
    workers: int = option(2, help="threads that copy", minimum=1)
    no_fsync: bool = option(False, help="do not wait for the disk; a power failure may then leave holes")


OPTIONS: Groups = {"": (RequiredLoadOptions, ConvertOptions, ConversionOptions, ModelConfigOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Convert, with a progress bar in bytes, and print what was written.

    Raises:
        UserError: of any kind; nothing is left at the target then.
    """
    from ..checkpoint.convert import convert
    from ..checkpoint.locate import locate
    from ..files import progress_bar

    options = from_arguments(ConversionOptions, args)
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
            adapter=None if args.adapter is None else locate(args.adapter),
            tokenizer=None if args.tokenizer is None else locate(args.tokenizer),
            force=args.force,
            resume=args.resume,
            workers=args.workers,
            fsync=not args.no_fsync,
            on_start=on_start,
            progress=bar.update,
        )
    print_config_notes(summary.config_notes, args)
    for note in summary.notes:
        print_notice(note)
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
