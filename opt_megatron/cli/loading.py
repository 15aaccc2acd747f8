"""From the arguments to a model on this rank's part of the layout, with its tokenizer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import add_config, add_load, add_runtime, config_argument, say_derived

if TYPE_CHECKING:
    from ..config import OPTConfig
    from ..model.opt_model import OPTModel
    from ..parallel import ParallelContext
    from ..tokenizer import OPTTokenizer

TOY_NOTICE = (
    "opt-megatron: no --load: using the embedded model 'story', a toy of 4.3 million parameters trained on fairy "
    "tales (not one of Meta's; good for trying things out)"
)


@dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
        num_tokens: ids from this one on are vocabulary padding.
    """

    parallel: ParallelContext
    config: OPTConfig
    model: OPTModel
    tokenizer: OPTTokenizer
    num_tokens: int


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
    from ..parallel import check_layout, check_seed, init_parallel, world_size_from_environment

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    check_layout(None, tp, pp, world_size_from_environment(), data_parallel=False)
    check_seed(args.seed)
    if args.dtype != "auto":
        check_dtype(args.dtype)
    return init_parallel(tp, pp, seed=args.seed, device=args.device)


def load(args: argparse.Namespace, parallel: ParallelContext) -> Loaded:
    """Find the checkpoint and read this rank's part of it.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..checkpoint.formats import open_checkpoint
    from ..checkpoint.load import load_model, locate_on_all_ranks
    from ..checkpoint.locate import EMBEDDED_NAME
    from ..parallel import check_layout, on_all_ranks

    directory = locate_on_all_ranks(EMBEDDED_NAME if args.load is None else args.load, parallel, args.revision)
    checkpoint = on_all_ranks(parallel, lambda: open_checkpoint(directory, config_argument(args)))
    config = checkpoint.config
    check_layout(
        config, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.world_size
    )
    tokenizer = on_all_ranks(parallel, lambda: read_tokenizer(args.tokenizer, directory, config))
    if parallel.is_leader:
        if args.load is None:
            print(TOY_NOTICE, file=sys.stderr)
        say_derived(checkpoint.derived)
    model = load_model(checkpoint, config, parallel, args.dtype, quantization=args.quantization)
    return Loaded(parallel, config, model, tokenizer, min(config.num_tokens, len(tokenizer)))


def read_tokenizer(name: str | None, directory: Path, config: OPTConfig) -> OPTTokenizer:
    """The tokenizer of --tokenizer, or the one beside the weights.

    Raises:
        UserError: there is none, or it has more entries than the model has rows.
    """
    from ..checkpoint.locate import locate
    from ..tokenizer import OPTTokenizer

    tokenizer = OPTTokenizer.from_directory(directory if name is None else locate(name))
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model {config.vocab_size} rows: "
            "it is another model's; give --tokenizer DIR"
        )
    return tokenizer
