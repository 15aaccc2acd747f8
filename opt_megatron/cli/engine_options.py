"""The engine's options as arguments, and the engine that they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import size_in_bytes

if TYPE_CHECKING:
    from torch import nn

    from ..generation.core.engine import Engine
    from ..parallel.context import ParallelContext


def add_engine(group: argparse._ArgumentGroup) -> None:
    """Declare them."""
    group.add_argument("--max-batch-size", type=int, default=16, metavar="N", help="sequences at a time; default: 16")
    group.add_argument(
        "--kv-cache-memory",
        metavar="SIZE",
        help="of a rank at the most, as 2GB; default: what the prompts need, in a server what --max-batch-size of the "
        "longest sequences need",
    )
    group.add_argument(
        "--prefill-chunk-size", type=int, default=256, metavar="N", help="tokens of prompts in a step; default: 256"
    )
    group.add_argument("--draft-model", metavar="CHECKPOINT", help="a smaller OPT that proposes tokens (speculation)")
    group.add_argument(
        "--prompt-lookup", action="store_true", help="propose what followed the newest tokens earlier (speculation)"
    )
    group.add_argument(
        "--num-speculative-tokens", type=int, default=4, metavar="N", help="proposed at a time; default: 4"
    )


def check_engine_options(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        UserError: an option is out of its range, or two exclude each other.
    """
    from ..config import check_dtype

    if args.dtype != "auto":
        check_dtype(args.dtype)
    for name in ("max_batch_size", "prefill_chunk_size", "num_speculative_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    if args.draft_model is not None and args.prompt_lookup:
        raise UserError("--draft-model and --prompt-lookup are given; use one of them")
    if args.kv_cache_memory is not None:
        size_in_bytes(args.kv_cache_memory)


def make_engine(
    args: argparse.Namespace, model: nn.Module, parallel: ParallelContext, num_tokens: int | None
) -> Engine:
    """The engine for this rank's part of the model, called on every rank.

    Raises:
        UserError: the draft model cannot be loaded, or does not fit.
    """
    from ..checkpoint.load import load_model, locate_on_all_ranks
    from ..generation.core.engine import Engine

    draft_model = None
    if args.draft_model is not None:
        directory = locate_on_all_ranks(args.draft_model, parallel)
        draft_model = load_model(directory, None, parallel, args.dtype, quantization=args.quantization)
    return Engine(
        model,
        parallel,
        max_batch_size=args.max_batch_size,
        kv_cache_memory=None if args.kv_cache_memory is None else size_in_bytes(args.kv_cache_memory),
        prefill_chunk_size=args.prefill_chunk_size,
        num_tokens=num_tokens,
        draft_model=draft_model,
        prompt_lookup=args.prompt_lookup,
        num_speculative_tokens=args.num_speculative_tokens,
    )
