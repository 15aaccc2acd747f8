"""The tensor parallel collectives of inference: sum and gather, over torch.distributed or over shared memory.

Decoding makes two small sums a layer. Over gloo each costs about 270 us on one host, whatever its size,
which is more than the matrix product beside it; through a page of shared memory it costs about 20 us.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import socket
import time
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .context import ParallelContext

_LINE = 8  # int64 numbers of a cache line: one flag each, so that ranks do not write to each other's lines
_SLOT_BYTES = 1 << 22  # what one rank can hand over in a round; larger tensors go in pieces
_SPINS = 200  # looks at the other ranks' flags before the processor is offered to somebody else
_SECONDS_BETWEEN_CHECKS = 0.05  # of whether the ranks that are waited for still live


class Collectives(Protocol):
    """What the tensor parallel ranks do together."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, the same to the bit on all of them."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of the same shape, joined along the last dimension in the order of ranks."""


class Alone:
    """One tensor parallel rank has nothing to do."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


class Distributed:
    """torch.distributed: nccl on GPUs, gloo between hosts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Joined along the last dimension."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)


class SharedMemory:
    """Ranks of one host hand tensors over in memory that all of them map.

    In every round each rank writes its part into its slot, raises its flag to the round's number and waits
    for the others' flags; then all read all slots. Two sets of slots alternate: a rank that has raised its
    flag for round k has finished reading round k - 1, so whoever has seen all flags at k may write over the
    slots of round k - 1. The sum is taken in the order of ranks by every rank: all get the same bits.

    That a flag is seen after the data that it announces is what x86 processors promise for ordinary writes;
    on others `tensor_parallel_collectives` does not choose this class.

    Raises (in the calls): RuntimeError when a rank that is waited for has ended.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        flags = self._size * _LINE * 8
        memory = _shared_memory(group, flags + 2 * self._size * _SLOT_BYTES)
        self._flags = np.frombuffer(memory, np.int64, self._size * _LINE)[::_LINE]
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=flags)
        self._slots = slots.view(2, self._size, _SLOT_BYTES)
        self._lives = _watch(group)
        # With fewer processors than ranks, whoever waits must give way at once.
        self._spins = _SPINS if len(os.sched_getaffinity(0)) >= dist.get_world_size() else 0
        self._round = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """A new tensor."""
        parts = self._exchange(tensor)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Joined along the last dimension."""
        return torch.cat(self._exchange(tensor), dim=-1)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors. They lie in shared memory and are good until the next call."""
        if tensor.nbytes <= _SLOT_BYTES:
            return self._exchange_piece(tensor)
        flat = tensor.reshape(-1)
        pieces = [
            [part.clone() for part in self._exchange_piece(piece)]
            for piece in flat.split(_SLOT_BYTES // tensor.element_size())
        ]
        return [torch.cat(parts).view(tensor.shape) for parts in zip(*pieces, strict=True)]

    def _exchange_piece(self, tensor: Tensor) -> list[Tensor]:
        self._round += 1
        slots = self._slots[self._round % 2]
        views = [slot[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for slot in slots.unbind()]
        views[self._rank].copy_(tensor)
        self._flags[self._rank] = self._round
        self._wait()
        return views

    def _wait(self) -> None:
        flags, number = self._flags, self._round
        for _ in range(self._spins):
            if flags.min() >= number:
                return
        next_check = time.monotonic() + _SECONDS_BETWEEN_CHECKS
        while flags.min() < number:
            os.sched_yield()
            if time.monotonic() > next_check:
                self._check_lives()
                next_check = time.monotonic() + _SECONDS_BETWEEN_CHECKS

    def _check_lives(self) -> None:
        poll = select.poll()
        for handle in self._lives:
            poll.register(handle, select.POLLIN)
        ended = [self._lives[handle] for handle, _ in poll.poll(0)]
        behind = [rank for rank in ended if self._flags[rank] < self._round]
        if behind:
            raise RuntimeError(f"Connection closed by peer: tensor parallel rank {behind[0]} has ended")


def tensor_parallel_collectives(parallel: ParallelContext) -> Collectives:
    """What suits this context; called on every rank of it.

    Shared memory where all tensor parallel ranks are processes of one x86 Linux host and compute on the CPU.
    """
    if parallel.tensor_model_parallel_size == 1:
        return Alone()
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    if _made and _made[-1][0] is group:  # every engine of a process uses the same memory
        return _made[-1][1]
    _made[:] = [(group, SharedMemory(group) if _can_share(parallel, group) else Distributed(group))]
    return _made[-1][1]


_made: list[tuple[dist.ProcessGroup, Collectives]] = []  # the latest group's


def _can_share(parallel: ParallelContext, group: dist.ProcessGroup) -> bool:
    able = parallel.device.type == "cpu" and platform.machine() == "x86_64" and hasattr(os, "pidfd_open")
    # Containers of one host may share its name; their process numbers mean nothing to one another.
    place = (socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino if able else None, able)
    places = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, place, group=group)
    return able and len(set(places)) == 1


def _shared_memory(group: dist.ProcessGroup, size: int) -> mmap.mmap:
    """Memory that the group's ranks map: made by the first one, without a name, and so never left behind."""
    descriptor = None
    if dist.get_rank(group) == 0:
        descriptor = os.memfd_create("opt_megatron")
        os.ftruncate(descriptor, size)
    source = [(os.getpid(), descriptor)]
    dist.broadcast_object_list(source, src=dist.get_global_rank(group, 0), group=group)
    process, number = source[0]
    if descriptor is None:
        opened = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    else:
        opened = descriptor
    memory = mmap.mmap(opened, size)
    dist.barrier(group)  # the first rank's descriptor must stay open until all have mapped it
    os.close(opened)
    return memory


def _watch(group: dist.ProcessGroup) -> dict[int, int]:
    """Handles of the other ranks' processes, which become readable when those end -> their ranks."""
    processes = [0] * dist.get_world_size(group)
    dist.all_gather_object(processes, os.getpid(), group=group)
    own = dist.get_rank(group)
    return {os.pidfd_open(process): rank for rank, process in enumerate(processes) if rank != own}
