"""The sections, one after another, and the JSON:

    format, passed, failed ["section: case"], seconds, settings
    sections  {name: {state, seconds, cases {name: {passed, figures, error}}, error}}

`state` is passed, failed, or "not begun" where time was over. A case's `passed` is null where nothing was claimed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from opt_megatron.errors import UserError
from opt_megatron.files import write_text_atomically

from ..worker import in_child, iterate_in_child
from .case import Case, compared
from .sections import tensor_parallel
from .settings import SMALL, Settings

FORMAT = 1
_MOST_SECONDS = 150  # of one section: one that hangs leaves time for the others
_LEAST_SECONDS = 10  # a section needs them for its imports

CasesOf = Callable[[Settings, float], Iterator[Case]]  # (settings, deadline of time.monotonic) -> cases


class Section(NamedTuple):
    """One section: what it does, and the generator of its cases, which starts processes."""

    help: str
    cases: CasesOf


def run(settings: Settings, names: list[str], seconds: float, path: Path) -> dict[str, Any]:
    """Run the sections; the file is rewritten after each.

    Args:
        names: of SECTIONS.
        seconds: for all; a section that has not ended by then is ended.
    """
    begin = time.monotonic()
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    result: dict[str, Any] = {"format": FORMAT, "passed": False, "failed": [], "settings": shown, "sections": {}}
    for name in names:
        deadline = min(begin + seconds, time.monotonic() + _MOST_SECONDS)
        result["sections"][name] = found = _run_section(SECTIONS[name], settings, deadline)
        result["failed"] += [f"{name}: {case}" for case, values in found["cases"].items() if values["passed"] is False]
        result["failed"] += [f"{name}: {found['error']}"] if "error" in found else []
        result["passed"] = not result["failed"] and len(result["sections"]) == len(names)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_text_atomically(path, json.dumps(result, indent=1) + "\n")
        print(f"[{result['seconds']:6.1f} s] {name}: {found['state']}", file=sys.stderr, flush=True)
    return result


def _run_section(section: Section, settings: Settings, deadline: float) -> dict[str, Any]:
    begin = time.monotonic()
    found: dict[str, Any] = {"state": "passed", "seconds": 0.0, "cases": {}}
    if deadline - begin < _LEAST_SECONDS:
        return found | {"state": "not begun", "error": "not begun: the time was over (see --seconds)"}
    try:
        for case in section.cases(settings, deadline):
            found["cases"][case.name] = case.to_json()
    except (UserError, RuntimeError, TimeoutError, OSError) as error:  # of the processes; cases catch their own
        found["error"] = f"{type(error).__name__}: {error}"[-2000:]
    is_good = "error" not in found and all(case["passed"] is not False for case in found["cases"].values())
    return found | {"state": "passed" if is_good else "failed", "seconds": round(time.monotonic() - begin, 1)}


def _in_a_process(module: str, *args: Any, function: str = "cases") -> CasesOf:
    """The cases that a function of a file in sections/ yields, in a process of its own."""

    def cases(settings: Settings, deadline: float) -> Iterator[Case]:
        name = f"the section {module}"
        return iterate_in_child(name, settings.threads, deadline, _call, module, function, settings, *args)

    return cases


def _make_checkpoint(settings: Settings) -> None:
    from . import models

    models.start(settings)
    models.make_checkpoint(settings, settings.size)


def _call(module: str, function: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"{__package__}.sections.{module}"), function)(*args)


def _features(settings: Settings, deadline: float) -> Iterator[Case]:
    """The GPU's values compared with the CPU's."""
    compute = _in_a_process("features", function="values")
    expected = {case.name: case for case in compute(settings.on_cpu(), deadline)}
    for case in compute(settings, deadline):
        yield compared(case, expected.get(case.name))


def _tensor_parallel(settings: Settings, deadline: float) -> Iterator[Case]:
    in_child("the random model", settings.threads, _make_checkpoint, settings, deadline=deadline)
    yield from tensor_parallel.cases(settings, deadline)


def _large(settings: Settings, deadline: float) -> Iterator[Case]:
    return _in_a_process("speed", settings.size)(settings, deadline)


SECTIONS = {
    "environment": Section("what is installed, and what the GPU is", _in_a_process("environment")),
    "parity": Section("logits and greedy tokens in three dtypes", _in_a_process("parity")),
    "int8": Section("8-bit weights", _in_a_process("int8")),
    "features": Section("every feature, against the CPU", _features),
    "cuda-graphs": Section("decode steps with CUDA graphs and without", _in_a_process("cuda_graphs")),
    "resuming": Section("training, saved and resumed", _in_a_process("resuming")),
    "training": Section("a training step, against transformers", _in_a_process("training")),
    "speed-small": Section(f"decode and prefill of {SMALL}", _in_a_process("speed", SMALL)),
    "speed": Section("decode and prefill of the large model (--size)", _large),
    "tensor-parallel": Section("the large model on all GPUs", _tensor_parallel),
}
