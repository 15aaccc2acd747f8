"""One network device for all of a process's gloo groups.

torch gives each group a device, a thread that wakes a hundred times a second until the group is destroyed, which
waits for its next wake-up. Megatron-core makes about twenty groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@contextlib.contextmanager
def gloo_groups_on_device_of(group: dist.ProcessGroup) -> Iterator[None]:
    """Inside the block, new gloo groups use the devices of `group`, a gloo group, instead of making their own.

    Where torch does not tell them (a group that TORCH_DISTRIBUTED_DEBUG=DETAIL has wrapped), nothing is changed.
    """
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    devices = getattr(options, "_devices", None)
    original = distributed_c10d.ProcessGroupGloo
    if devices:
        setattr(distributed_c10d, "ProcessGroupGloo", _made_on(devices, original))  # noqa: B010  (mypy: a type)
    try:
        yield
    finally:
        setattr(distributed_c10d, "ProcessGroupGloo", original)  # noqa: B010


def _made_on(devices: list[Any], original: Any) -> type:
    """A subclass, since torch tests what it has made with `isinstance`.

    Its other arguments depend on torch's version; each has the name of an attribute of the options.
    """

    class ProcessGroupOnDevices(original):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, **others: Any) -> None:
            options = original._Options()
            options._devices, options._timeout = devices, timeout
            for name, value in others.items():
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    return ProcessGroupOnDevices
