"""opt-megatron evaluate perplexity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import progress_bar
from .loading import add_model, open_model, print_notices, start_ranks

if TYPE_CHECKING:
    from ..evaluation.perplexity import Documents, Perplexity
    from ..tokenizer import OPTTokenizer

HELP = "perplexity, nats a token and bits a byte of texts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_model(parser)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help=".jsonl: a text a line under --json-key; else one text"
    )
    parser.add_argument("--json-key", default="text", metavar="KEY", help="default: text")
    parser.add_argument(
        "--context", type=int, metavar="N", help="positions of a window, BOS included; default: all that the model has"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="tokens that a window adds; below the context windows overlap and a token has at least context - S "
        "before it; default: the context (consecutive windows)",
    )
    parser.add_argument(
        "--per-document",
        action="store_true",
        help="score each text by itself; default: all concatenated, as the training loss has it",
    )
    parser.add_argument("--no-eos", action="store_true", help="without the end of sequence behind each text")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows in a pass; default: 8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> None:
    """Load, score, print.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    _check_options(args)
    parallel = start_ranks(args)
    from ..evaluation.perplexity import perplexity
    from ..parallel.context import on_all_ranks

    # The file need not be there on other machines.
    texts = on_all_ranks(parallel, lambda: _read(args) if parallel.is_leader else [])
    opt = open_model(args, parallel, batch_size=args.batch_size)
    print_notices(args, opt)
    documents = parallel.broadcast_object(
        on_all_ranks(parallel, lambda: _tokenize(texts, opt.tokenizer, args) if parallel.is_leader else None)
    )
    opt.load()
    with progress_bar("scoring", unit=" windows", hidden=not parallel.is_leader) as bar:

        def on_windows(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        result = perplexity(
            opt,
            documents,
            context=args.context,
            stride=args.stride,
            concatenate=not args.per_document,
            on_windows=on_windows,
        )
    if parallel.is_leader:
        print(_as_json(args, result) if args.json else _as_text(args, result))


def _check_options(args: argparse.Namespace) -> None:
    for name in ("batch_size", "context", "stride"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")


def _read(args: argparse.Namespace) -> list[str]:
    from ..evaluation.data import read_texts

    return read_texts(Path(args.data), args.json_key)


def _tokenize(texts: list[str], tokenizer: OPTTokenizer, args: argparse.Namespace) -> Documents:
    from ..evaluation.perplexity import tokenize

    return tokenize(texts, tokenizer, add_eos=not args.no_eos)


def _as_json(args: argparse.Namespace, result: Perplexity) -> str:
    from ..checkpoint.locate import EMBEDDED_NAME

    return json.dumps({"model": args.load or EMBEDDED_NAME, "data": args.data, **result.to_dict()})


def _as_text(args: argparse.Namespace, result: Perplexity) -> str:
    kind = "consecutive" if result.stride == result.context else f"one every {result.stride} tokens"
    over = "over the concatenated texts" if result.is_concatenated else "over each text by itself"
    texts = "1 text" if result.documents == 1 else f"{result.documents:,} texts"
    return "\n".join(
        (
            f"data            {args.data}: {texts}, {result.tokens:,} tokens, {result.bytes:,} bytes",
            f"windows         {result.windows:,} of {result.context} positions, {kind}, {over}",
            f"nats a token    {result.nats_per_token:.4f}",
            f"bits a byte     {result.bits_per_byte:.4f}",
            f"perplexity      {result.perplexity:.3f}",
        )
    )
