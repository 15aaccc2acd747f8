"""The loop over sizes, dtypes and workloads; the results so far are written after every row.

The JSON:

    format, finished, started, seconds
    machine     processor, cores, memory_bytes, load_before, platform, python, versions
    settings    the options, with the sizes of the workloads as `shape`
    bandwidth   [{gb_per_s, kernels: {name: GB/s}, bytes}]: the best one sets the limits
    models      {size: {parameters, config}}
    equality    [{size, dtype, what, systems: {name: {equal, tokens, equal_rows, rows}}}]
    tuned       [{size, dtype, system, seconds: {setting: seconds}}]: the fastest setting was used
    rows        [{size, dtype, workload, case, metric, systems}], metric with its unit, lower is better, and
                systems: {name: {median, min, max, samples, ratio, over_limit}}, ratio to this project's median.
                Where they apply also limit_bytes, limit (ms), cache_bytes, tokens_per_second
                {system: tokens}, rate (requests a second), last_arrival (s)
    notes       [text]
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

from . import workload_runs
from .machine import cache_limit, check_memory, describe_machine, usable_cores
from .measure import measure_bandwidth
from .options import PLOT, RESULT, BenchmarkOptions
from .peak_memory import measure_peak_memory
from .plot import save_plot
from .report import ResultRow, add_limits, format_table
from .system_protocol import Setup
from .systems import OURS, SYSTEMS
from .training_systems import RECOMPUTING, TRAINING_SYSTEMS, training_memory, training_system_class
from .weights import make_model, model_directory
from .worker import Worker, in_child
from .workload import make_prompts
from .workload_runs import Group

FORMAT = 1  # of the JSON
_WITH_ALL_LOADED = ("prefill", "decode", "context", "mixed", "poisson")
_NO_INT8 = "transformers has no int8 of its own on a CPU: only CTranslate2 is compared in int8"
_NOT_ON_A_GPU = "--device cuda has not yet been run on a GPU by this project: take these numbers with care"


def run(options: BenchmarkOptions) -> dict[str, Any]:
    """Measure what the options select, write the files, print the table and, last, the JSON in one line.

    Raises:
        UserError: something cannot be measured; most of it is found before the first measurement.
    """
    options.check()
    for name, config in options.sizes.items():
        check_memory(name, config, options)
    options.output.mkdir(parents=True, exist_ok=True)
    with _work_dir(options) as work_dir:
        session = Session(options, work_dir)
        for name, config in options.sizes.items():
            session.measure_size(name, config)
        result = session.finish()
    save_plot(result, options.output / PLOT)
    print(format_table(result))
    print(json.dumps(result))
    return result


class Session:
    """One run of the benchmark, and its result so far."""

    def __init__(self, options: BenchmarkOptions, work_dir: Path) -> None:
        self._options = options
        self._work_dir = work_dir
        self._started = time.time()
        self._result: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": describe_machine(),
            "settings": _options_as_json(options),
            "bandwidth": [],
            "models": {},
            "equality": [],
            "tuned": [],
            "rows": [],
            "notes": _notes(options),
        }

    def measure_size(self, name: str, config: OPTConfig) -> None:
        """Measure all selected workloads of one model."""
        options = self._options
        model = model_directory(self._work_dir, name, config)
        log_progress(f"{name}: making random weights")
        conversions = tuple(d for d in options.dtypes if "ctranslate2" in options.systems_for(d))
        in_child("the making of weights", usable_cores(), make_model, model, config, conversions)
        self._result["models"][name] = {"parameters": config.num_parameters, "config": config.to_hf()}
        for dtype in options.dtypes:
            self._measure_bandwidth()  # the best of several counts: other processes may use memory too
            limit = cache_limit(config, options, dtype)
            setup = Setup(model, dtype, options.threads, options.device, limit)
            self._measure_together(name, config, setup)
            if "memory" in options.workloads:
                self._measure_memory(name, config, setup)
            if "tensor_parallel" in options.workloads:
                self._measure_tensor_parallel(name, config, setup)
            if "training" in options.workloads and dtype != "int8":
                self._measure_training(name, config, setup)

    def finish(self) -> dict[str, Any]:
        """The whole result, written."""
        self._result["finished"] = True
        self._write()
        return self._result

    def _measure_together(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """The workloads for which all systems are loaded and run in turn."""
        options = self._options
        if not any(workload in options.workloads for workload in _WITH_ALL_LOADED):
            return
        systems = {system: (system, setup) for system in options.systems_for(setup.dtype)}
        with self._group(name, config, systems) as group:
            self._result["equality"].append(workload_runs.equality(group))
            for workload in ("prefill", "decode", "context"):
                if workload in options.workloads:
                    self._record(workload, group, getattr(workload_runs, workload)(group))
            if "mixed" in options.workloads or "poisson" in options.workloads:
                self._serve(group)

    def _serve(self, group: Group) -> None:
        serving = workload_runs.ServingRuns(group)
        log_progress(f"{group.name} {group.dtype}: best setting of each system for the mixed workload")
        serving.warm_up()
        for workload in ("mixed", "poisson"):
            if workload in self._options.workloads:
                self._record(workload, group, getattr(serving, workload)())
        self._result["equality"] += serving.equality
        for system, seconds in serving.tuned.items():
            entry = {"size": group.name, "dtype": group.dtype, "system": system, "seconds": seconds}
            self._result["tuned"].append(entry)
        self._write()

    def _measure_memory(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """Each system alone in a fresh process."""
        log_progress(f"{name} {setup.dtype}: memory")
        rows, length, new_tokens = self._options.workload_sizes.memory
        prompts = make_prompts(config, rows, length, self._options.seed)
        found: dict[str, dict[str, list[float]]] = {}
        for system in self._options.systems_for(setup.dtype):
            arguments = (SYSTEMS[system], setup, prompts, new_tokens)
            for metric, value in in_child(system, setup.threads, measure_peak_memory, *arguments).items():
                found.setdefault(metric, {})[system] = [value]
        case = f"{rows} x ({length} + {new_tokens}) tokens"
        for metric, samples in found.items():
            self._result["rows"].append(workload_runs.make_row(name, setup.dtype, "memory", case, metric, samples))
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
            self._result["equality"].append(workload_runs.equality(group))
            self._record("tensor_parallel", group, iter([workload_runs.decode_row(group, "tensor_parallel", 1)]))

    def _measure_training(self, name: str, config: OPTConfig, setup: Setup) -> None:
        """Time and memory of a training step, of this project and of a plain loop with transformers."""
        systems = {system: (system, setup) for system in TRAINING_SYSTEMS if system in self._options.systems}
        with self._group(name, config, systems, "training_systems:TRAINING_SYSTEMS") as group:
            self._record("training", group, workload_runs.training(group))
        if self._options.device == "cuda":
            return
        log_progress(f"{name} {setup.dtype}: memory of training")
        rows, length = self._options.workload_sizes.training
        prompts = [list(row) for row in make_prompts(config, rows, length + 1, self._options.seed)]
        found = {
            system: [in_child(system, setup.threads, training_memory, training_system_class(system), setup, prompts)]
            for system in (*systems, RECOMPUTING)
        }
        case = f"{rows} x {length} tokens"
        self._result["rows"].append(workload_runs.make_row(name, setup.dtype, "training", case, "growth, MB", found))
        self._write()

    @contextmanager
    def _group(
        self, name: str, config: OPTConfig, systems: dict[str, tuple[str, Setup]], kinds: str = "systems:SYSTEMS"
    ) -> Iterator[Group]:
        with ExitStack() as stack:
            workers = {}
            for label, (system, setup) in systems.items():
                log_progress(f"{name} {setup.dtype}: loading {label}")
                workers[label] = stack.enter_context(Worker(system, setup, kinds))
            yield Group(self._options, name, config, setup.dtype, workers)

    def _record(self, workload: str, group: Group, rows: Iterator[ResultRow]) -> None:
        log_progress(f"{group.name} {group.dtype}: {workload}")
        for row in rows:
            self._result["rows"].append(row)
            self._write()

    def _measure_bandwidth(self) -> None:
        log_progress("measuring the memory's bandwidth")
        threads, device = self._options.threads, self._options.device
        self._result["bandwidth"].append(in_child("the bandwidth", threads, measure_bandwidth, threads, device))

    def _note(self, text: str) -> None:
        log_progress(text)
        self._result["notes"].append(text)

    def _write(self) -> None:
        self._result["seconds"] = time.time() - self._started
        add_limits(self._result)
        write_text_atomically(self._options.output / RESULT, json.dumps(self._result, indent=1) + "\n")


def log_progress(text: str) -> None:
    """Print the current activity to stderr."""
    print(f"benchmark: {text}", file=sys.stderr, flush=True)


@contextmanager
def _work_dir(options: BenchmarkOptions) -> Iterator[Path]:
    if options.work_dir is not None:
        yield options.work_dir
    else:
        with tempfile.TemporaryDirectory(prefix="benchmark-models-") as directory:
            yield Path(directory)


def _why_not_two_ranks(config: OPTConfig, setup: Setup) -> str | None:
    if setup.device == "cuda":
        return "it is one of CPU threads"
    if setup.threads < 2:
        return "it needs 2 threads"
    if config.num_attention_heads % 2 or config.vocab_size % 2:
        return "the model does not divide by 2"
    return None


def _notes(options: BenchmarkOptions) -> list[str]:
    notes = [_NOT_ON_A_GPU] if options.device == "cuda" else []
    return notes + [_NO_INT8] * ("int8" in options.dtypes and "transformers" in options.systems)


def _options_as_json(options: BenchmarkOptions) -> dict[str, Any]:
    kept = ("dtypes", "workloads", "systems", "threads", "device", "repeats", "mixed_repeats", "poisson_rate", "seed")
    values = {name: getattr(options, name) for name in kept}
    return values | {"sizes": list(options.sizes), "shape": vars(options.workload_sizes)}
