"""opt-megatron logit-lens: a picture of which token each layer predicts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..options import Options, option
from .arguments import ModelOptions, RuntimeOptions, check_picture
from .loading import open_model, print_notices, start_ranks
from .option_groups import Groups, add_groups

HELP = "draw which token each layer predicts, as a PNG (extra: plot)"
EXAMPLE = 'opt-megatron logit-lens --load opt-125m --prompt "The capital of France is" --output lens.png'


@dataclass(frozen=True, kw_only=True)
class LogitLensOptions(Options):
    """The prompt, and the picture to write."""

    prompt: str = option(help="what the model reads", metavar="TEXT", required=True)
    output: str = option(help="the picture", metavar="FILE.png", required=True, is_path=True)
    last: int = option(24, help="show so many of its tokens", minimum=1)
    force: bool = option(False, help="replace the file")


OPTIONS: Groups = {"": (ModelOptions, RuntimeOptions, LogitLensOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Load the model, compute the lens, and write the picture.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    output = Path(args.output)
    _check(args, output)
    parallel = start_ranks(args, OPTIONS)
    opt = open_model(args, parallel)
    print_notices(args, opt)
    from ..analysis.logit_lens import draw, logit_lens
    from ..parallel.context import on_all_ranks

    lens = logit_lens(opt, opt.tokens(args.prompt))
    title = f"{opt.name}: likeliest next token, by layer"
    on_all_ranks(parallel, lambda: draw(lens, opt, output, last=args.last, title=title) if parallel.is_leader else None)
    if parallel.is_leader:
        print(f"wrote {output}: {len(lens.best)} rows, {min(args.last, len(lens.tokens))} tokens")


def _check(args: argparse.Namespace, output: Path) -> None:
    if not args.prompt:
        raise UserError("--prompt is empty; give the text that the model reads")
    check_picture(output, args.force)
