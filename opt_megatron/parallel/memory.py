"""How much memory a device has left, and one sentence for what was too much for it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ..errors import UserError, first_line
from .launch_environment import local_world_size

if TYPE_CHECKING:
    import torch

ADVICE = (
    "`opt-megatron plan` prints what a model needs; divide it among more devices (--tensor-model-parallel-size, "
    "--pipeline-model-parallel-size), store it in 8 bits (--quantization), or run smaller batches"
)
_SIGNS = re.compile(r"out of memory|(cannot|can't|unable to) allocate|bad_alloc", re.IGNORECASE)
# Of torch on a CPU and on a GPU, and of numpy.
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate) (\d[\d.]* \w+)", re.IGNORECASE)
_GPU_MEMORY = re.compile(r"total capacity of (\S+ \w+) of which (\S+ \w+) is free")
_OWN_GROUPS, _CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# The files of a control group, of version 2 and 1: limit, use, and in memory.stat the part of the use that is a cache
# of files, which the kernel frees when memory is needed.
_GROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes that are free, and all there are."""

    free: int
    total: int


def device_memory(device: torch.device) -> Memory:
    """The memory of a GPU, or this process's share of the machine's, which is divided among the ranks on it."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(free + unused, total)
    memory, ranks = host_memory(), local_world_size()
    return Memory(memory.free // ranks, memory.total // ranks)


def host_memory() -> Memory:
    """The machine's memory, or less where this process's control group or its address space (ulimit -v) is limited."""
    machine = psutil.virtual_memory()
    limits = [Memory(machine.available, machine.total), *_group_limits(), *_address_space()]
    return Memory(min(limit.free for limit in limits), min(limit.total for limit in limits))


def _group_limits() -> Iterator[Memory]:
    """The limits of this process's control group and of those that it is in (a container's, a job's)."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        hierarchy, limit, usage, cache = _GROUP_FILES[bool(controllers)]
        group = _CONTROL_GROUPS / hierarchy / path.lstrip("/")
        for directory in (group, *group.parents):
            try:
                total, used = int((directory / limit).read_text()), int((directory / usage).read_text())
                statistics = dict(row.split() for row in (directory / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max" where there is no limit, and no files above the hierarchy
                continue
            yield Memory(max(0, total - used + int(statistics.get(cache, 0))), total)


def _address_space() -> Iterator[Memory]:
    total, _ = resource.getrlimit(resource.RLIMIT_AS)
    if total != resource.RLIM_INFINITY:
        yield Memory(max(0, total - psutil.Process().memory_info().vms), total)


def require_memory(num_bytes: int, what: str, device: torch.device) -> None:
    """Refuse what cannot fit, because on a CPU the kernel would end the process without a word.

    Args:
        num_bytes: at least what will be allocated.
        what: the sentence's subject, in the plural.

    Raises:
        UserError: `num_bytes` are more than there are; on a CPU, free swap space counts.
    """
    memory = device_memory(device)
    swap = psutil.swap_memory().free if device.type == "cpu" else 0
    if num_bytes > memory.free + swap:
        raise UserError(
            f"out of memory: {what} take {_size(num_bytes)} on this rank, and {_size(memory.free)} of "
            f"{_size(memory.total)} are free: {ADVICE}"
        )


def out_of_memory_message(error: BaseException) -> str | None:
    """A sentence about an error that says that memory is exhausted; None for another error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError | OSError) and _SIGNS.search(first_line(error, 1000))
    ):
        return None
    asked, gpu = _ASKED.search(text), _GPU_MEMORY.search(text)
    memory = host_memory()
    total, free = (gpu[1], gpu[2]) if gpu else (_size(memory.total), _size(memory.free))
    wanted = f"{_readable(asked[1])} more were asked for" if asked else first_line(error)
    return f"out of memory: {wanted}, and {free} of {total} are free: {ADVICE}"


def _readable(amount: str) -> str:
    return _size(int(amount.split()[0])) if amount.endswith(" bytes") else amount


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
