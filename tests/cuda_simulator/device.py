"""torch.cuda: streams, events, and what it takes from its C++ part; the rest of it runs as it is."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace
from typing import Any

import torch

from .graphs import CudaGraph
from .tensors import DEVICE, default_generator
from .traffic import WAIT, CaptureError, is_capturing, refuse, transfer


class Stream:
    """A stream whose work is done at once."""

    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def synchronize(self) -> None:
        transfer(WAIT, "Stream.synchronize")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """An event that has happened as soon as it is recorded; its times are the host's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        if is_capturing():
            refuse(CaptureError, "Event.query while a CUDA graph is captured")
        return True

    def synchronize(self) -> None:
        transfer(WAIT, "Event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other._seconds - self._seconds)


_stream = Stream()
_MEMORY = 80 * 2**30  # bytes that the device says it has, all of them free


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="simulated",
        major=9,
        minor=0,
        total_memory=_MEMORY,
        multi_processor_count=132,
        warp_size=32,
        uuid=f"GPU-{os.environ.get('LOCAL_RANK', 0)}",
    )


def install_cuda(devices: int) -> None:
    """Only what torch.cuda takes from its C++ part; the rest of it runs as it is."""
    cuda = torch.cuda
    torch._C._cuda_getDevice = lambda: DEVICE.index
    cuda._initialized = True
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.device_count = cuda.random.device_count = lambda: devices
    cuda.set_device = lambda device: None
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.default_generators = (default_generator,) * devices
    cuda.get_device_name = lambda device=None: "simulated"
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = _properties
    cuda.mem_get_info = lambda device=None: (_MEMORY, _MEMORY)
    cuda.nccl.version = lambda: (2, 27, 3)
    cuda.synchronize = lambda device=None: transfer(WAIT, "synchronize")
    cuda.empty_cache = lambda: None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _stream
    cuda.CUDAGraph, cuda.is_current_stream_capturing = CudaGraph, is_capturing
    torch._C._host_emptyCache = lambda: None
