"""opt-megatron logit-lens: a picture of which token each layer predicts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from .loading import add_model, open_model, print_notices, start_ranks

HELP = 'draw which token each layer predicts, as a PNG (pip install -e ".[plot]")'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model reads")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--last", type=int, default=24, metavar="N", help="show so many of its tokens; default: 24")
    parser.add_argument("--force", action="store_true", help="replace the file")


def run(args: argparse.Namespace) -> None:
    """Load, look, draw.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    output = Path(args.output)
    _check(args, output)
    parallel = start_ranks(args)
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
    if args.last < 1:
        raise UserError(f"--last is {args.last}, but must be at least 1")
    if not args.prompt:
        raise UserError("--prompt is empty; give the text that the model reads")
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: is drawn as a PNG; end its name with .png")
    if output.exists() and not args.force:
        raise UserError(f"--output {output}: is there already; --force replaces it")
