"""The options of one run of the benchmark, and their checks, which need no model and come first."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError

from .systems import DTYPES
from .workload import WorkloadSizes

# Threads of some OpenMP libraries spin for 0.2 s after their last work; the next system's turn waits for that.
SETTLE_SECONDS = 0.25
RESULT, PLOT = "benchmark.json", "benchmark.png"
_LIBRARIES = {"transformers": ["transformers"], "ctranslate2": ["ctranslate2", "transformers"]}  # its converter's


@dataclass(frozen=True)
class BenchmarkOptions:
    """One run.

    Attributes:
        sizes: name -> config of each model.
        systems: this project first, then the others.
        repeats: of every short run; `mixed_repeats` of a whole stream of requests.
        poisson_rate: requests a second; None: about as many as this project can serve.
        output: the directory of the JSON and the PNG.
        work_dir: the directory that keeps the models for the next run; None: they are not kept.
    """

    sizes: dict[str, OPTConfig]
    dtypes: tuple[str, ...]
    workloads: tuple[str, ...]
    systems: tuple[str, ...]
    workload_sizes: WorkloadSizes
    threads: int
    repeats: int
    mixed_repeats: int
    output: Path
    device: str = "cpu"
    poisson_rate: float | None = None
    seed: int = 1
    settle_seconds: float = SETTLE_SECONDS
    force: bool = False
    work_dir: Path | None = None

    def systems_for(self, dtype: str) -> tuple[str, ...]:
        """The systems that can run in `dtype` on the device."""
        return tuple(system for system in self.systems if system in DTYPES[self.device][dtype])

    def check(self) -> None:
        """Raise UserError if something cannot be measured."""
        self._check_counts()
        if self.poisson_rate is not None and not 0 < self.poisson_rate < float("inf"):
            raise UserError(f"--poisson-rate is {self.poisson_rate}, but must be a number of requests above 0")
        for dtype in self.dtypes:
            if dtype not in DTYPES[self.device]:
                raise UserError(f"{dtype} is not measured on {self.device}: use {', '.join(DTYPES[self.device])}")
        for name, config in self.sizes.items():
            self.workload_sizes.check_fits(config, name)
        self._check_installed()
        self._check_output()

    def _check_counts(self) -> None:
        for argument, value in (
            ("--threads", self.threads),
            ("--repeats", self.repeats),
            ("--mixed-repeats", self.mixed_repeats),
            ("--requests", self.workload_sizes.requests),
        ):
            if value < 1:
                raise UserError(f"{argument} is {value}, but must be at least 1")

    def _check_installed(self) -> None:
        needed = {"matplotlib", *(library for system in self.systems[1:] for library in _LIBRARIES[system])}
        missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
        if missing:
            raise UserError(f'{" and ".join(missing)} cannot be imported; install the extra: pip install -e ".[bench]"')

    def _check_output(self) -> None:
        if (self.output / RESULT).exists() and not self.force:
            raise UserError(f"{self.output / RESULT} exists: choose another --output, or replace it with --force")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output} is not a directory: choose another --output")
