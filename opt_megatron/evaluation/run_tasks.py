"""lm-eval's tasks on a model that is divided among ranks: the leader runs lm-eval, and all ranks compute."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingPackageError, UserError, first_line, print_notice, shorten

if TYPE_CHECKING:
    from .evaluator import Evaluator

SHIPPED_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class TaskOptions:
    """What to run.

    Attributes:
        tasks: names of tasks, groups or tags (with * and ?), or YAML files.
        include_path: a directory with other tasks.
        num_fewshot: examples before each question; None for the task's own number.
        limit: number of items of each task, the first ones; None for all.
        bootstrap_iters: resamples for standard errors that have no closed form; 0 leaves all errors out.
        seed: for choosing the few-shot examples.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    bootstrap_iters: int = 1000
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("no task is named; fairy_last_word and fairy_minimal_pairs are always there")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"{self.include_path}: there is no such directory of tasks")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("bootstrap_iters", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, but must be at least {least}")


def check_installed() -> None:
    """Raise UserError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm-eval", "evaluate lm-eval", "eval")


def run_tasks(evaluator: Evaluator, options: TaskOptions) -> dict[str, Any]:
    """lm-eval's results (`simple_evaluate`); on the leader, within `evaluator.lead`.

    Raises:
        UserError: a task is unknown or cannot be loaded, does not fit the model, or has too few examples.
    """
    check_installed()
    # lm-eval would fork a pool of processes from this one, which has process groups.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints as it goes; stdout is for the results
        from lm_eval import evaluator as lm_evaluator
        from lm_eval import simple_evaluate

        from .lm_eval_model import OPTMegatronLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        # Otherwise lm-eval runs git in the working directory, which prints an error where that is no repository.
        lm_evaluator.get_git_commit_hash = lambda: None
        with _report_too_few_examples(options):
            results = simple_evaluate(
                OPTMegatronLM.from_evaluator(evaluator),
                tasks=list(options.tasks),
                num_fewshot=options.num_fewshot,
                batch_size=evaluator.opt.batch_size,
                limit=options.limit,
                bootstrap_iters=options.bootstrap_iters,
                task_manager=_task_manager(options),
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
    _report_other_numbers_of_shots(results, options.num_fewshot)
    return results


@contextlib.contextmanager
def _report_too_few_examples(options: TaskOptions) -> Iterator[None]:
    """Turn the error of `random.sample`, by which lm-eval chooses examples, into a sentence about the task."""
    try:
        yield
    except ValueError as error:
        if options.num_fewshot and "larger than population" in str(error):
            raise UserError(
                f"num_fewshot is {options.num_fewshot}, but a task of {shorten(list(options.tasks))} has fewer "
                "examples to draw from: ask for fewer"
            ) from error
        raise


def _report_other_numbers_of_shots(results: dict[str, Any], wanted: int | None) -> None:
    others = [
        f"{task} ({count})" for task, count in results["n-shot"].items() if wanted is not None and count != wanted
    ]
    if others:
        print_notice(
            f"--num-fewshot {wanted} was not used where the task's own file fixes another number: {shorten(others)}"
        )


def _task_manager(options: TaskOptions) -> Any:
    """lm-eval's manager of this project's and the user's tasks, and of lm-eval's own tasks if one is requested.

    Indexing lm-eval's own tasks takes seconds.
    """
    paths = [str(path) for path in (SHIPPED_TASKS, options.include_path) if path is not None]
    if options.include_path is not None:
        print_notice(f"--include-path {options.include_path}: the tasks there can run Python code (!function)")
    manager = _manager_class()(include_path=paths, include_defaults=False)
    if not _unknown(manager, options.tasks):
        return manager
    manager = _manager_class()(include_path=paths)
    unknown = _unknown(manager, options.tasks)
    if unknown:
        raise UserError(
            f"lm-eval knows no task {shorten(unknown)}; `lm-eval ls tasks` lists its own, --include-path adds others"
        )
    return manager


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [name for name in tasks if not manager.match_tasks([name]) and not Path(name).is_file()]


def _manager_class() -> type:
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):
        """Reports in one line a task that cannot be loaded (no network for its data, a wrong YAML)."""

        def load(self, tasks: Any) -> Any:
            try:
                return super().load([name for task in tasks for name in (self.match_tasks([task]) or [task])])
            except Exception as error:  # whatever a task's file or the datasets library raises
                raise UserError(f"lm-eval cannot load {shorten(list(tasks))}: {first_line(error)}") from error

    return Manager
