"""From the arguments to ranks and an opened checkpoint."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .arguments import add_config, add_load, add_runtime, config_argument, say_derived

if TYPE_CHECKING:
    from ..parallel.context import ParallelContext
    from ..pretrained import Pretrained

TOY_NOTICE = (
    "opt-megatron: no --load: using the embedded model 'story', a toy of 4.3 million parameters trained on fairy "
    "tales (not one of Meta's; good for trying things out)"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where and how it runs."""
    add_load(parser, required=False)
    add_config(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer's files are; default: --load")
    add_runtime(parser)
    parser.add_argument("--quantization", choices=("int8",), help="8-bit weights, quantised while loading")


def start_parallel(args: argparse.Namespace) -> ParallelContext:
    """Check the arguments that need no model, and start the ranks.

    Raises:
        UserError: the layout does not fit the number of processes, or an argument is out of its range.
    """
    from ..config import check_dtype
    from ..parallel.context import check_seed, init_parallel
    from ..parallel.layout import check_layout, world_size_from_environment

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    check_layout(None, tp, pp, world_size_from_environment(), data_parallel=False)
    check_seed(args.seed)
    if args.dtype != "auto":
        check_dtype(args.dtype)
    return init_parallel(tp, pp, seed=args.seed, device=args.device)


def open_model(args: argparse.Namespace, parallel: ParallelContext, *, needs_tokenizer: bool = True) -> Pretrained:
    """Open the checkpoint of --load, and tell what was derived of its config.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..checkpoint.locate import EMBEDDED_NAME
    from ..parallel.context import on_all_ranks
    from ..pretrained import open_pretrained

    config = on_all_ranks(parallel, lambda: config_argument(args))
    pretrained = open_pretrained(
        EMBEDDED_NAME if args.load is None else args.load,
        parallel,
        revision=args.revision,
        config=config,
        tokenizer=args.tokenizer,
        needs_tokenizer=needs_tokenizer,
    )
    if parallel.is_leader:
        if args.load is None:
            print(TOY_NOTICE, file=sys.stderr)
        say_derived(pretrained.checkpoint.config_notes)
    return pretrained
