"""opt-megatron compress: a smoothed, pruned or quantised copy of a checkpoint, on one process or under torchrun."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from ..compression.options import CalibrationOptions, SavingOptions
from ..compression.recipe import find_recipe
from ..errors import UserError, print_notice
from ..options import Options, from_arguments, option
from .arguments import LayoutOptions, ModelOptions, config_argument
from .loading import lost_rank_policy, print_notices
from .option_groups import Groups, add_groups, comparable_options

HELP = "smooth, prune or quantise a checkpoint's weights by SmoothQuant, SparseGPT, Wanda or GPTQ"
EXAMPLE = "opt-megatron compress --load opt-125m --save gptq4 --recipe gptq4-g128 --calibration-data train.jsonl"

_MINUTES = 24 * 60  # that a pipeline stage may wait for those before it; lost ranks are noticed by their heartbeat


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where a compression runs."""

    device: str | None = option(
        None, help="device to run on", choices=("cpu", "cuda"), default_text="cuda where there is one"
    )


OPTIONS: Groups = {
    "": (ModelOptions, SavingOptions),
    "calibration": (CalibrationOptions,),
    "how it runs": (LayoutOptions, DeviceOptions),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Compress, and print what was written.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..config import check_dtype
    from ..files import progress_bar
    from ..parallel.context import check_seed, init_parallel, on_all_ranks
    from ..parallel.core_compat import import_core
    from ..parallel.launch_environment import world_size_from_environment
    from ..parallel.layout import check_layout

    began, (tp, pp) = time.monotonic(), (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    check_layout(None, tp, pp, world_size_from_environment())
    check_seed(args.seed)
    if not args.save.strip():
        raise UserError("--save is empty; is a shell variable unset?")
    if args.dtype is not None:
        check_dtype(args.dtype)
    recipe = find_recipe(args.recipe)
    if recipe.needs_samples and args.calibration_data is None:
        raise UserError("the recipe needs calibration: give --calibration-data, a text or JSON lines")
    import_core()
    parallel = init_parallel(
        tp,
        pp,
        device=args.device,
        timeout_minutes=_MINUTES,
        options=comparable_options(args, OPTIONS),
        lost_ranks=lost_rank_policy(args),
    )
    from ..api import OPT
    from ..checkpoint.locate import EMBEDDED_NAME

    opt = OPT.open(
        EMBEDDED_NAME if args.load is None else args.load,
        parallel,
        revision=args.revision,
        adapter=args.adapter,
        config=on_all_ranks(parallel, lambda: config_argument(args)),
        tokenizer=args.tokenizer,
        use_generation_config=False,
    )
    print_notices(args, opt)
    total = 6 * opt.config.num_layers
    with progress_bar("compressing", unit=" linears", total=total, hidden=not parallel.is_leader) as bar:
        report = opt.compress(
            args.save,
            recipe,
            from_arguments(CalibrationOptions, args),
            to=args.to,
            dtype=args.dtype,
            force=args.force,
            resume=args.resume,
            on_linears=bar.update,
        )
    if parallel.is_leader:
        for note in report.notes:
            print_notice(note)
        steps = ", ".join(name for step in report.recipe for name in step)
        print(
            f"wrote {args.save}: {steps} of {total} linears, {report.zeros:.2%} zeros, "
            f"in {time.monotonic() - began:,.1f} s; compression_report.md has each of them"
        )
