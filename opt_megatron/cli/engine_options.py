"""The engine's options as arguments."""

from __future__ import annotations

import argparse

from ..errors import UserError
from ..generation.engine_options import EngineOptions
from .arguments import size_in_bytes


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


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What the arguments say.

    Raises:
        UserError: --kv-cache-memory is not a size.
    """
    return EngineOptions(
        max_batch_size=args.max_batch_size,
        kv_cache_memory=None if args.kv_cache_memory is None else size_in_bytes(args.kv_cache_memory),
        prefill_chunk_size=args.prefill_chunk_size,
        draft_model=args.draft_model,
        prompt_lookup=args.prompt_lookup,
        num_speculative_tokens=args.num_speculative_tokens,
    )
