"""The loop over sizes, dtypes and workloads; what is known so far is written after every row.

The JSON:

    format, finished, started, seconds
    machine     processor, cores, memory_bytes, load_before, platform, python, versions
    settings    what was asked for, `shape` with the sizes of the workloads
    bandwidth   [{gb_per_s, kernels: {name: GB/s}, bytes}]: the best one sets the limits
    models      {size: {parameters, config}}
    equality    [{size, dtype, what, systems: {peer: {equal, tokens, equal_rows, rows}}}]
    tuned       [{size, dtype, system, seconds: {setting: seconds}}]: the quickest setting was used
    rows        [{size, dtype, workload, case, metric, systems}], metric with its unit, less is better, and
                systems: {name: {median, min, max, samples, ratio, over_limit}}, ratio to this project's median.
                Where they mean something also limit_bytes, limit (ms), cache_bytes, tokens_per_second
                {system: tokens}, rate (requests a second), last_arrival (s)
    notes       [what else to know]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from opt_megatron.config import OPTConfig
from opt_megatron.files import write_text_atomically

from . import cells
from .cells import Group
from .machine import cache_limit, check_memory, describe_machine, usable_cores
from .measure import measure_bandwidth
from .memory import measure_memory
from .peer import Setup
from .peers import OURS, PEERS
from .plot import draw
from .report import add_limits, format_table
from .settings import PLOT, RESULT, Settings
from .trainers import RECOMPUTING, TRAINERS, trainer_class, training_memory
from .weights import make_model, model_directory
from .worker import Worker, in_child
from .workload import make_prompts

FORMAT = 1  # of the JSON
_WITH_ALL_LOADED = ("prefill", "decode", "context", "mixed", "poisson")
_NO_INT8 = "transformers has no int8 of its own on a CPU: only CTranslate2 is compared in int8"
_NOT_ON_A_GPU = "--device cuda has not yet been run on a GPU by this project: take these numbers with care"


def run(settings: Settings) -> dict[str, Any]:
    """Measure all that the settings ask for, write the files, print the table and, last, the JSON in one line.

    Raises:
        UserError: something cannot be measured; most of it is found before the first measurement.
    """
    settings.check()
    for name, config in settings.sizes.items():
        check_memory(name, config, settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    with _work_dir(settings) as work_dir:
        session = Session(settings, work_dir)
        for name, config in settings.sizes.items():
            session.measure_size(name, config)
        result = session.finish()
    draw(result, settings.output / PLOT)
    print(format_table(result))
    print(json.dumps(result))
    return result


class Session:
    """A run that is under way."""

    def __init__(self, settings: Settings, work_dir: Path) -> None:
        self._settings = settings
        self._work_dir = work_dir
        self._started = time.time()
        self._result: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": describe_machine(),
            "settings": _settings_as_json(settings),
            "bandwidth": [],
            "models": {},
            "equality": [],
            "tuned": [],
            "rows": [],
            "notes": _notes(settings),
        }

    def measure_size(self, name: str, config: OPTConfig) -> None:
        """All that is asked for of one model."""
        settings = self._settings
        model = model_directory(self._work_dir, name, config)
        say(f"{name}: making random weights")
        conversions = tuple(d for d in settings.dtypes if "ctranslate2" in settings.systems_for(d))
        in_child("the making of weights", usable_cores(), make_model, model, config, conversions)
        self._result["models"][name] = {"parameters": config.num_parameters, "config": config.to_hf()}
        for dtype in settings.dtypes:
            self._measure_bandwidth()  # each time, and the best counts: others may use the memory meanwhile
            limit = cache_limit(config, settings, dtype)
            setup = Setup(model, dtype, settings.threads, settings.device, limit)
            self._measure_together(name, config, setup)
            if "memory" in settings.workloads:
                self._measure_memory(name, config, setup)
            if "tensor_parallel" in settings.workloads:
                self._measure_tensor_parallel(name, config, setup)
            if "training" in settings.workloads and dtype != "int8":
                self._measure_training(name, config, setup)

    def finish(self) -> dict[str, Any]:
        """The whole result, written."""
        self._result["finished"] = True
        self._write()
        return self._result

    def _measure_together(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """The workloads in which the systems take turns, all of them loaded."""
        settings = self._settings
        if not any(workload in settings.workloads for workload in _WITH_ALL_LOADED):
            return
        systems = {system: (system, setup) for system in settings.systems_for(setup.dtype)}
        with self._group(name, config, systems) as group:
            self._result["equality"].append(cells.equality(group))
            for workload in ("prefill", "decode", "context"):
                if workload in settings.workloads:
                    self._take(workload, group, getattr(cells, workload)(group))
            if "mixed" in settings.workloads or "poisson" in settings.workloads:
                self._serve(group)

    def _serve(self, group: Group) -> None:
        serving = cells.Serving(group)
        say(f"{group.name} {group.dtype}: best setting of each system for the mixed workload")
        serving.warm_up()
        for workload in ("mixed", "poisson"):
            if workload in self._settings.workloads:
                self._take(workload, group, getattr(serving, workload)())
        self._result["equality"] += serving.equality
        for system, seconds in serving.tuned.items():
            entry = {"size": group.name, "dtype": group.dtype, "system": system, "seconds": seconds}
            self._result["tuned"].append(entry)
        self._write()

    def _measure_memory(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """Each system alone in a fresh process."""
        say(f"{name} {setup.dtype}: memory")
        rows, length, new_tokens = self._settings.shape.memory
        prompts = make_prompts(config, rows, length, self._settings.seed)
        found: dict[str, dict[str, list[float]]] = {}
        for system in self._settings.systems_for(setup.dtype):
            arguments = (PEERS[system], setup, prompts, new_tokens)
            for metric, value in in_child(system, setup.threads, measure_memory, *arguments).items():
                found.setdefault(metric, {})[system] = [value]
        case = f"{rows} x ({length} + {new_tokens}) tokens"
        for metric, samples in found.items():
            self._result["rows"].append(cells.make_row(name, setup.dtype, "memory", case, metric, samples))
        self._write()

    def _measure_tensor_parallel(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """This project on one rank with all threads, and on two with half of them each."""
        reason = _why_not_two_ranks(config, setup)
        if reason:
            self._note(f"{name} {setup.dtype}: no tensor parallel measurement: {reason}")
            return
        half = replace(setup, threads=setup.threads // 2, ranks=2)
        systems = {f"TP1, {setup.threads} threads": (OURS, setup), f"TP2, {half.threads} each": (OURS, half)}
        with self._group(name, config, systems) as group:
            self._result["equality"].append(cells.equality(group))
            self._take("tensor_parallel", group, iter([cells.decode_row(group, "tensor_parallel", 1)]))

    def _measure_training(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """A training step of this project and of a plain loop with transformers, and what each needs of memory."""
        systems = {system: (system, setup) for system in TRAINERS if system in self._settings.systems}
        with self._group(name, config, systems, "trainers:TRAINERS") as group:
            self._take("training", group, cells.training(group))
        if self._settings.device == "cuda":
            return
        say(f"{name} {setup.dtype}: memory of training")
        rows, length = self._settings.shape.training
        prompts = [list(row) for row in make_prompts(config, rows, length + 1, self._settings.seed)]
        found = {
            system: [in_child(system, setup.threads, training_memory, trainer_class(system), setup, prompts)]
            for system in (*systems, RECOMPUTING)
        }
        case = f"{rows} x {length} tokens"
        self._result["rows"].append(cells.make_row(name, setup.dtype, "training", case, "growth, MB", found))
        self._write()

    @contextmanager
    def _group(
        self, name: str, config: OPTConfig, systems: dict[str, tuple[str, Setup]], kinds: str = "peers:PEERS"
    ) -> Iterator[Group]:
        with ExitStack() as stack:
            workers = {}
            for label, (system, setup) in systems.items():
                say(f"{name} {setup.dtype}: loading {label}")
                workers[label] = stack.enter_context(Worker(system, setup, kinds))
            yield Group(self._settings, name, config, setup.dtype, workers)

    def _take(self, workload: str, group: Group, rows: Iterator[cells.Row]) -> None:
        say(f"{group.name} {group.dtype}: {workload}")
        for row in rows:
            self._result["rows"].append(row)
            self._write()

    def _measure_bandwidth(self) -> None:
        say("measuring the memory's bandwidth")
        threads, device = self._settings.threads, self._settings.device
        self._result["bandwidth"].append(in_child("the bandwidth", threads, measure_bandwidth, threads, device))

    def _note(self, text: str) -> None:
        say(text)
        self._result["notes"].append(text)

    def _write(self) -> None:
        self._result["seconds"] = time.time() - self._started
        add_limits(self._result)
        write_text_atomically(self._settings.output / RESULT, json.dumps(self._result, indent=1) + "\n")


def say(text: str) -> None:
    """Tell on stderr what is being done."""
    print(f"benchmark: {text}", file=sys.stderr, flush=True)


@contextmanager
def _work_dir(settings: Settings) -> Iterator[Path]:
    if settings.work_dir is not None:
        yield settings.work_dir
    else:
        with tempfile.TemporaryDirectory(prefix="benchmark-models-") as place:
            yield Path(place)


def _why_not_two_ranks(config: OPTConfig, setup: Setup) -> str | None:
    if setup.device == "cuda":
        return "it is one of CPU threads"
    if setup.threads < 2:
        return "it needs 2 threads"
    if config.num_attention_heads % 2 or config.vocab_size % 2:
        return "the model does not divide by 2"
    return None


def _notes(settings: Settings) -> list[str]:
    notes = [_NOT_ON_A_GPU] if settings.device == "cuda" else []
    return notes + [_NO_INT8] * ("int8" in settings.dtypes and "transformers" in settings.systems)


def _settings_as_json(settings: Settings) -> dict[str, Any]:
    kept = ("dtypes", "workloads", "systems", "threads", "device", "repeats", "mixed_repeats", "poisson_rate", "seed")
    values = {name: getattr(settings, name) for name in kept}
    return values | {"sizes": list(settings.sizes), "shape": vars(settings.shape)}
