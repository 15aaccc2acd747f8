"""opt-megatron evaluate lm-eval: runs tasks of lm-eval, on one process or under torchrun."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import dtype_name
from ..errors import UserError, print_notice
from ..options import Options, option
from .arguments import GenerationConfigOptions, ModelOptions, RuntimeOptions
from .loading import open_model, print_notices, start_ranks
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..api import OPT
    from ..evaluation.run_tasks import TaskOptions

HELP = "tasks of lm-eval (extra: eval), and two small ones that need no network"
EXAMPLE = "opt-megatron evaluate lm-eval --load opt-125m --tasks lambada_openai piqa"
_FILES = {"results.json", "results.md"}


@dataclass(frozen=True, kw_only=True)
class LmEvalOptions(Options):
    """Which tasks run, and where the results are written."""

    tasks: tuple[str, ...] = option(
        help="lm-eval's, your own (--include-path), or fairy_last_word and fairy_minimal_pairs, which come with this "
        "package; separated by spaces or commas",
        nargs="+",
        metavar="NAME",
        required=True,
    )
    include_path: str | None = option(
        None,
        help="a directory with YAML files of tasks; they can run Python code (!function), so it must be one you trust",
        metavar="DIR",
        is_path=True,
    )
    num_fewshot: int | None = option(None, help="examples before each", minimum=0, default_text="the task's")
    limit: int | None = option(None, help="only the first so many items of each task", minimum=1)
    batch_size: int = option(8, help="sequences in a pass", minimum=1)
    bootstrap_iters: int = option(1000, help="resamples for errors that have no closed form", minimum=0)
    output: str | None = option(None, help="write results.json and results.md there", metavar="DIR", is_path=True)
    force: bool = option(False, help="replace the results that are in --output")
    json: bool = option(False, help="print one JSON object instead of Markdown")


OPTIONS: Groups = {"": (ModelOptions, RuntimeOptions, GenerationConfigOptions, LmEvalOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Load, run the tasks, print and write.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read by lm-eval's own bars, when they are imported
    from ..evaluation.run_tasks import TaskOptions, check_installed

    check_installed()
    options = TaskOptions(
        tuple(name for word in args.tasks for name in word.split(",") if name),
        None if args.include_path is None else Path(args.include_path),
        args.num_fewshot,
        args.limit,
        args.bootstrap_iters,
        args.seed,
    )
    if args.output is not None:
        _check_output(Path(args.output), args.force)
    parallel, use_generation_config = start_ranks(args, OPTIONS), not args.no_generation_config
    opt = open_model(args, parallel, use_generation_config=use_generation_config, batch_size=args.batch_size)
    print_notices(args, opt)
    if args.include_path is not None and opt.parallel.is_leader:
        print_notice(f"{args.include_path}: lm-eval's YAML files can run Python (!function)")
    _evaluate(args, options, opt.load())


def _evaluate(args: argparse.Namespace, options: TaskOptions, opt: OPT) -> None:
    from ..evaluation.evaluator import Evaluator
    from ..evaluation.report import to_json, to_markdown
    from ..evaluation.run_tasks import run_tasks

    evaluator = Evaluator(opt)

    def action() -> None:
        settings = {
            "dtype": dtype_name(opt.model.params_dtype),
            "quantization": args.quantization,
            "group_size": args.group_size,
            "batch_size": args.batch_size,
            "limit": args.limit,
            "bootstrap_iters": args.bootstrap_iters,
            "seed": args.seed,
        }
        report = to_json(run_tasks(evaluator, options), opt, settings)
        print(json.dumps(report, ensure_ascii=False) if args.json else to_markdown(report).rstrip(), flush=True)
        if args.output is not None:  # last: a full disk must not lose results that took hours
            _write(Path(args.output), report, args.force)

    evaluator.lead(action)


def _check_output(directory: Path, force: bool) -> None:
    """Raise UserError unless results can be written there, before anything is computed."""
    from ..files import recover_directory

    if not directory.exists():
        parent = next(parent for parent in directory.absolute().parents if parent.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise UserError(f"--output {directory}: cannot be made, as {parent} is no directory that can be written")
        return
    recover_directory(directory)
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    if not directory.is_dir() or found - _FILES or any((directory / name).is_dir() for name in found):
        raise UserError(f"--output {directory}: is there and is no directory of results; name another")
    if found and not force:
        raise UserError(f"--output {directory}: holds results already; --force replaces them")


def _write(directory: Path, report: dict[str, Any], force: bool) -> None:
    from ..evaluation.report import to_markdown
    from ..files import PartialDirectory

    with PartialDirectory(directory) as partial:
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        (partial.path / "results.json").write_text(text, encoding="utf-8")
        (partial.path / "results.md").write_text(to_markdown(report), encoding="utf-8")
        partial.publish(replace=force)
