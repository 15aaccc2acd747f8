"""The tensor parallel collectives of inference: sum and gather, over torch.distributed or over shared memory.

Decoding makes two small sums in each layer. Over gloo each costs about 270 us on one host, whatever its size,
which is more than the matrix product before it; through a page of shared memory it costs about 20 us.
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

_LINE = 8  # int64 numbers in a cache line: each flag has its own, so that no two ranks write to the same line
_SLOT_BYTES = 1 << 22  # what one rank can pass on in a round; larger tensors are sent in pieces
_SPINS = 200  # reads of the other ranks' flags before the rank yields the processor
_SECONDS_BETWEEN_CHECKS = 0.05  # of whether the processes of the other ranks still exist


class Collectives(Protocol):
    """The collectives of the tensor parallel ranks; each method is called on all of them."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, bit-identical on all of them; may be `tensor` itself, overwritten."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, all of one shape, concatenated along the last dimension in the order of ranks."""


class NoOpCollectives:
    """For a single tensor parallel rank: both methods return `tensor` itself."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        return tensor


class DistributedCollectives:
    """torch.distributed: nccl on GPUs, gloo between hosts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See Collectives; in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)


class SharedMemoryCollectives:
    """Ranks of one host exchange tensors through memory that all of them map.

    In every round each rank writes its part into its slot, sets its flag to the round's number and waits
    for the others' flags; then all read all slots. Two sets of slots alternate: a rank that has set its
    flag to round k has finished reading round k - 1, so a rank that has seen all flags at k may overwrite the
    slots of round k - 1. Every rank sums in the order of ranks, so all get the same bits.

    That a flag becomes visible after the data written before it is guaranteed by x86 processors for ordinary
    writes; on others `tensor_parallel_collectives` does not choose this class.

    Raises:
        RuntimeError: in both methods, if the process of another rank has ended.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        flags = self._size * _LINE * 8
        memory = _shared_memory(group, flags + 2 * self._size * _SLOT_BYTES)
        self._flags = np.frombuffer(memory, np.int64, self._size * _LINE)[::_LINE]
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=flags)
        self._slots = slots.view(2, self._size, _SLOT_BYTES)
        self._watched = _watch(group)
        # With fewer processors than ranks, a rank that waits must yield at once.
        self._spins = _SPINS if len(os.sched_getaffinity(0)) >= dist.get_world_size() else 0
        self._round = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See Collectives; a new tensor."""
        parts = self._exchange(tensor)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See Collectives."""
        return torch.cat(self._exchange(tensor), dim=-1)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors, in shared memory: valid until the next call."""
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
                self._check_processes()
                next_check = time.monotonic() + _SECONDS_BETWEEN_CHECKS

    def _check_processes(self) -> None:
        poll = select.poll()
        for handle in self._watched:
            poll.register(handle, select.POLLIN)
        ended = [self._watched[handle] for handle, _ in poll.poll(0)]
        behind = [rank for rank in ended if self._flags[rank] < self._round]
        if behind:
            raise RuntimeError(f"Connection closed by peer: tensor parallel rank {behind[0]} has ended")


def tensor_parallel_collectives(parallel: ParallelContext) -> Collectives:
    """The fastest collectives for this context; called on all of its ranks.

    They use shared memory if all tensor parallel ranks are processes of one x86 Linux host and compute on the CPU.
    """
    if parallel.tensor_model_parallel_size == 1:
        return NoOpCollectives()
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    if _made and _made[-1][0] is group:  # all engines of a process use the same memory
        return _made[-1][1]
    _made[:] = [(group, _make_collectives(parallel, group))]
    return _made[-1][1]


_made: list[tuple[dist.ProcessGroup, Collectives]] = []  # of the latest group


def _make_collectives(parallel: ParallelContext, group: dist.ProcessGroup) -> Collectives:
    return SharedMemoryCollectives(group) if _can_share(parallel, group) else DistributedCollectives(group)


def _can_share(parallel: ParallelContext, group: dist.ProcessGroup) -> bool:
    able = parallel.device.type == "cpu" and platform.machine() == "x86_64" and hasattr(os, "pidfd_open")
    # Containers on one host may have the same host name, but process ids of different namespaces.
    host = (socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino if able else None, able)
    hosts = [host] * dist.get_world_size(group)
    dist.all_gather_object(hosts, host, group=group)
    return able and len(set(hosts)) == 1


def _shared_memory(group: dist.ProcessGroup, size: int) -> mmap.mmap:
    """Memory that the group's ranks map. The first one makes it without a name, so it cannot outlive the processes."""
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
    """Descriptors of the other ranks' processes, readable once a process has ended -> rank."""
    processes = [0] * dist.get_world_size(group)
    dist.all_gather_object(processes, os.getpid(), group=group)
    own = dist.get_rank(group)
    return {os.pidfd_open(process): rank for rank, process in enumerate(processes) if rank != own}
