"""opt-megatron evaluate perplexity: the perplexity of texts, on one process or under torchrun."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import progress_bar
from ..options import Options, option
from .arguments import ModelOptions, RuntimeOptions
from .loading import open_model, print_notices, start_ranks
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..evaluation.perplexity import Documents, Perplexity
    from ..tokenizer import OPTTokenizer

HELP = "perplexity, nats a token and bits a byte of texts"
EXAMPLE = "opt-megatron evaluate perplexity --load opt-125m --data valid.jsonl"


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(Options):
    """Which texts are scored, and how they are cut into windows."""

    data: str = option(
        help=".jsonl: a text a line under --json-key; else one text", metavar="FILE", required=True, is_path=True
    )
    json_key: str = option("text", help="the text's key in each object", metavar="KEY")
    context: int | None = option(
        None, help="positions of a window, BOS included", minimum=1, default_text="all that the model has"
    )
    stride: int | None = option(
        None,
        help="tokens that a window adds; below the context windows overlap and a token has at least context - S "
        "before it",
        minimum=1,
        metavar="S",
        default_text="the context (consecutive windows)",
    )
    per_document: bool = option(
        False, help="score each text by itself; default: all concatenated, as the training loss has it"
    )
    no_eos: bool = option(False, help="without the end of sequence behind each text")
    batch_size: int = option(8, help="windows in a pass", minimum=1)
    json: bool = option(False, help="print one JSON object instead")


OPTIONS: Groups = {"": (ModelOptions, RuntimeOptions, PerplexityOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Load, score, print.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    parallel = start_ranks(args, OPTIONS)
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
        print(_as_json(args, opt.name, result) if args.json else _as_text(args, result))


def _read(args: argparse.Namespace) -> list[str]:
    from ..evaluation.data import read_documents

    return read_documents(Path(args.data), args.json_key)


def _tokenize(texts: list[str], tokenizer: OPTTokenizer, args: argparse.Namespace) -> Documents:
    from ..evaluation.perplexity import tokenize

    return tokenize(texts, tokenizer, add_eos=not args.no_eos)


def _as_json(args: argparse.Namespace, name: str, result: Perplexity) -> str:
    return json.dumps({"model": name, "data": args.data, **result.to_dict()})


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
