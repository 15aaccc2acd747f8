"""lm-eval's results as JSON and as a Markdown page, with the command and the versions that reproduce them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..api import OPT
from ..version import __version__
from .published_scores import SCORES, SIZES, SOURCE, is_percentage

_PACKAGES = ("lm_eval", "torch", "megatron-core")


def command_line() -> str:
    """The command that started this process, torchrun included, to be pasted into a shell."""
    words = [Path(sys.argv[0]).name if sys.argv[0].endswith("opt-megatron") else sys.argv[0], *sys.argv[1:]]
    if words[0].endswith(".py"):
        words.insert(0, "python")
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            launcher += ["--nnodes", os.environ["GROUP_WORLD_SIZE"]]
        words = launcher + (words[1:] if words[0] == "python" else ["--no-python", *words])
    return shlex.join(words)


def to_json(results: dict[str, Any], opt: OPT, settings: dict[str, Any]) -> dict[str, Any]:
    """The scores and everything that they depend on.

    Args:
        results: of lm-eval's `simple_evaluate`.
        settings: how the model was run and the tasks were asked for.
    """
    parallel = opt.parallel
    return {
        "command": command_line(),
        "model": opt.name,
        "parameters": opt.config.num_parameters,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "device": parallel.device.type,
        **settings,
        "versions": {"opt_megatron": __version__, **{name: _version(name) for name in _PACKAGES}},
        "scores": [_score(*row, results) for row in _metrics(results)],
    }


def to_markdown(report: dict[str, Any]) -> str:
    """A page with the command, the model, a row for every score, and published scores of the same tasks."""
    layout = f"TP{report['tensor_model_parallel_size']} x PP{report['pipeline_model_parallel_size']}"
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        f"# {report['model']}: lm-eval",
        "",
        f"{report['parameters']:,} parameters, {report['dtype']}, {layout} on {report['device']}; {versions}",
        "",
        "```bash",
        report["command"],
        "```",
        "",
        *_table(
            ("task", "version", "shots", "items", "metric", "better", "value", "standard error"),
            (_row(score) for score in report["scores"]),
        ),
    ]
    # The published scores are zero-shot, over all items.
    published = [
        score
        for score in report["scores"]
        if (score["task"], score["metric"]) in SCORES and score["num_fewshot"] == 0 and report.get("limit") is None
    ]
    if published:
        lines += [
            "",
            f"Beside Meta's OPT models, zero-shot, as published with lm-eval ({SOURCE}); accuracies in percent:",
            "",
            *_table(("task", "metric", "this run", *SIZES), (_comparison(score) for score in published)),
        ]
    return "\n".join(lines) + "\n"


def _metrics(results: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """(task, metric, filter) of every score, in lm-eval's order."""
    for task, values in results["results"].items():
        for key in values:
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                yield task, metric, filtered


def _score(task: str, metric: str, filtered: str, results: dict[str, Any]) -> dict[str, Any]:
    values = results["results"][task]
    error = values.get(f"{metric}_stderr,{filtered}")
    return {
        "task": task,
        "version": results["versions"].get(task),
        "num_fewshot": results["n-shot"].get(task),
        "items": results.get("n-samples", {}).get(task, {}).get("effective"),
        "metric": metric,
        "filter": filtered,
        "value": values[f"{metric},{filtered}"],
        "stderr": error if isinstance(error, float) else None,
        "higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric),
    }


def _row(score: dict[str, Any]) -> tuple[str, ...]:
    better = {True: "higher", False: "lower", None: ""}[score["higher_is_better"]]
    error = "" if score["stderr"] is None else f"± {score['stderr']:.4f}"
    shown = [score[name] for name in ("task", "version", "num_fewshot", "items", "metric")]
    return (*("" if value is None else str(value) for value in shown), better, _number(score["value"]), error)


def _comparison(score: dict[str, Any]) -> tuple[str, ...]:
    scale = 100 if is_percentage(score["metric"]) else 1
    error = "" if score["stderr"] is None else f" ± {scale * score['stderr']:.2f}"
    theirs = SCORES[score["task"], score["metric"]]
    return score["task"], score["metric"], f"{scale * score['value']:.2f}{error}", *(f"{value:.2f}" for value in theirs)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
