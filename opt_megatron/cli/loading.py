"""From a command's arguments to an `OPT`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import print_notice
from .arguments import config_argument, print_config_notes
from .option_groups import Groups, comparable_options

if TYPE_CHECKING:
    from ..api import OPT
    from ..generation.engine_options import EngineOptions
    from ..parallel.context import ParallelContext
    from ..parallel.heartbeat import LostRankPolicy

TOY_NOTICE = (
    "no --load: using the embedded model 'story', a toy of 4.3 million parameters trained on fairy "
    "tales (not one of Meta's; good for trying things out)"
)


def start_ranks(
    args: argparse.Namespace, groups: Groups, on_lost: Callable[[str], object] | None = None
) -> ParallelContext:
    """Check the arguments that need no model, and start the ranks.

    Args:
        groups: the options that must be the same on all ranks.
        on_lost: as for `lost_rank_policy`.

    Raises:
        UserError: the layout does not fit the number of processes, or an argument is out of its range, or not the same
            on all ranks.
    """
    from ..parallel.core_compat import import_core

    import_core()
    from ..pretrained import start_parallel

    return start_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
        options=comparable_options(args, groups),
        lost_ranks=lost_rank_policy(args, on_lost),
    )


def lost_rank_policy(args: argparse.Namespace, on_lost: Callable[[str], object] | None = None) -> LostRankPolicy:
    """What happens when another rank gives no sign of life for --step-timeout seconds: by default this one ends."""
    from ..parallel.heartbeat import LostRankPolicy
    from . import exit_now

    return LostRankPolicy(args.step_timeout, on_lost or (lambda message: exit_now(message, 1)))


def open_model(
    args: argparse.Namespace,
    parallel: ParallelContext,
    *,
    needs_tokenizer: bool = True,
    use_generation_config: bool = False,
    batch_size: int = 8,
    engine: EngineOptions | None = None,
) -> OPT:
    """The model of --load, its weights not read yet.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..api import OPT
    from ..checkpoint.locate import EMBEDDED_NAME
    from ..model.linear_methods.registry import with_group_size
    from ..parallel.context import on_all_ranks

    return OPT.open(
        EMBEDDED_NAME if args.load is None else args.load,
        parallel,
        dtype=args.dtype,
        revision=args.revision,
        adapter=args.adapter,
        config=on_all_ranks(parallel, lambda: config_argument(args)),
        tokenizer=args.tokenizer,
        needs_tokenizer=needs_tokenizer,
        use_generation_config=use_generation_config,
        quantization=with_group_size(args.quantization, args.group_size),
        batch_size=batch_size,
        engine=engine,
    )


def print_notices(args: argparse.Namespace, opt: OPT) -> None:
    """Say on stderr that no model was named, what of the config was inferred from the tensors, and what
    generation_config.json does."""
    if not opt.parallel.is_leader:
        return
    if args.load is None:
        print_notice(TOY_NOTICE)
    if opt.pretrained.checkpoint is not None:
        print_config_notes(opt.pretrained.checkpoint.config_notes, args)
    told = opt.pretrained.generation_config.describe(opt.config.eos_token_id)
    if told:
        print_notice(told)
