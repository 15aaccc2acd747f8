"""What is free, and the sentence for what was too much."""

import resource
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from opt_megatron.errors import UserError
from opt_megatron.parallel import memory
from opt_megatron.parallel.context import on_all_ranks
from opt_megatron.parallel.memory import Memory, device_memory, host_memory, out_of_memory_message, require_memory

CPU = torch.device("cpu")
CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free."
)
MIB = 2**20


def caught(action) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as info:
        action()
    return info.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (caught(lambda: torch.empty(10**15)), ["4000000.00 GB more were asked for", " GB are free"]),
        (caught(lambda: np.empty(10**15, np.float32)), ["3.55 PiB more were asked for"]),
        (CUDA, ["2.50 GiB more were asked for, and 1.25 GiB of 79.10 GiB are free"]),
        (MemoryError("std::bad_alloc"), ["std::bad_alloc"]),
        (OSError(12, "Cannot allocate memory"), ["Cannot allocate memory"]),
    ],
)
def test_errors_of_memory_say_what_was_asked_for_and_what_there_is(alone, error, words):
    message = out_of_memory_message(error)
    assert message.startswith("out of memory: ") and all(word in message for word in words)
    assert all(word in message for word in ("opt-megatron plan", "--tensor-model-parallel-size", "--quantization"))

    def fail():
        raise error

    with pytest.raises(UserError, match="out of memory: "):
        on_all_ranks(alone, fail)


def test_other_errors_are_none_of_memory():
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("out of memory")):
        assert out_of_memory_message(error) is None


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/job/step", {"memory.max": 600, "memory.current": 500, "memory.stat": "anon 1\ninactive_file {300}"}),
        (
            "4:cpu,cpuacct:/x\n9:memory:/job/step",
            {"memory.limit_in_bytes": 600, "memory.usage_in_bytes": 500, "memory.stat": "total_inactive_file {300}"},
        ),
    ],
)
def test_the_limits_of_a_control_group_count(tmp_path, monkeypatch, line, files):
    """The limit is the parent group's: 600 MiB, of which 500 are used, 300 of them by a cache of files."""
    hierarchy = tmp_path / "memory" if "memory" in line else tmp_path
    (hierarchy / "job" / "step").mkdir(parents=True)
    for name, value in files.items():
        text = str(value * MIB) if isinstance(value, int) else value.replace("{300}", str(300 * MIB))
        (hierarchy / "job" / name).write_text(text)
        (hierarchy / "job" / "step" / name).write_text("max" if name == "memory.max" else text)
    (tmp_path / "cgroup").write_text(line + "\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "cgroup")
    assert host_memory() == Memory(400 * MIB, 600 * MIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device_memory(CPU).free == 100 * MIB
    with pytest.raises(UserError, match=r"the weights take 1\d\d\d.* GB on this rank, and 0.10 GB of 0.16 GB are free"):
        require_memory(10**12 + psutil.swap_memory().free, "the weights", CPU)


def test_a_limited_address_space_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (psutil.Process().memory_info().vms + 5 * MIB, -1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 50, total=1 << 50))
    assert 0 < host_memory().free <= 5 * MIB
