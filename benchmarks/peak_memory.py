"""A system's peak memory, measured in a fresh process from /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path

from opt_megatron.errors import UserError

from .system_protocol import Setup, System
from .workload import PromptTokens


def measure_peak_memory(
    kind: type[System], setup: Setup, prompts: list[PromptTokens], new_tokens: int
) -> dict[str, float]:
    """Load a model and use it once.

    Returns:
        MB by name. `libraries`: resident after the imports, before the model. `loading`, `running`: the peaks of
        resident memory (VmHWM) until the model is loaded, and from then on; libraries and mapped files count.
        `growth`: of the process's anonymous memory (RssAnon), from before the model to after the run. On CUDA also
        `device`: the peak of what torch allocated. Values that the operating system does not give are left out.
    """
    kind.prepare(setup)
    libraries, before = status("VmRSS"), status("RssAnon")
    system = kind(setup)
    loading = status("VmHWM")
    # Resets the peak where the kernel allows it; elsewhere `running` is the peak of both.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    system.generate(prompts, new_tokens)
    after = status("RssAnon")
    known = {"libraries": libraries, "loading": loading, "running": status("VmHWM")}
    known["growth"] = None if before is None or after is None else after - before
    if setup.device == "cuda":
        import torch

        known["device"] = torch.cuda.max_memory_allocated() / 1e6
    return {name: value for name, value in known.items() if value is not None}


def known_status(field: str) -> float:
    """`status`, where there must be one.

    Raises:
        UserError: this system has no /proc.
    """
    value = status(field)
    if value is None:
        raise UserError(f"memory cannot be measured here: /proc/self/status has no {field}")
    return value


def status(field: str) -> float | None:
    """A size of this process in MB, or None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 / 1e6 if values else None
