"""Starts torch.distributed and Megatron's process groups; the only module that chooses device and backend.

    parallel = init_parallel(tensor_model_parallel_size=2, pipeline_model_parallel_size=1, seed=1234)

All other modules receive the frozen `ParallelContext` that it returns. Rank order is Megatron's: tensor
parallel ranks are adjacent, pipeline stages are farthest apart.
"""

from __future__ import annotations

import atexit
import random
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ..errors import UserError
from ..version import __version__
from .agreement import check_same_on_all_ranks
from .core_compat import prepare_megatron
from .gloo_device import gloo_groups_on_device_of
from .heartbeat import LostRankPolicy, watch_ranks
from .launch_environment import check_network_interfaces, launch_environment, local_rank, world_size_from_environment
from .layout import check_layout
from .memory import out_of_memory_message
from .rendezvous import meet

T = TypeVar("T")
LEADER = 0  # the rank that reads the input, schedules, samples and prints


@dataclass(frozen=True)
class ParallelContext:
    """This process's position in the layout, and its device.

    Attributes:
        control_group: all ranks, over gloo: messages about a step never pass through a GPU.
    """

    rank: int
    world_size: int
    local_rank: int
    tensor_model_parallel_size: int
    tensor_model_parallel_rank: int
    pipeline_model_parallel_size: int
    pipeline_model_parallel_rank: int
    data_parallel_size: int
    data_parallel_rank: int
    device: torch.device
    control_group: dist.ProcessGroup

    @property
    def is_leader(self) -> bool:
        """Whether this rank reads the input, schedules, samples and prints."""
        return self.rank == LEADER

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pipeline_model_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the output head."""
        return self.pipeline_model_parallel_rank == self.pipeline_model_parallel_size - 1

    @property
    def pipeline_stride(self) -> int:
        """The difference in rank between a pipeline stage and the next."""
        return self.world_size // self.pipeline_model_parallel_size

    @property
    def logits_rank(self) -> int:
        """The rank of the last stage that sends the logits to the leader (its tensor rank 0)."""
        return self.pipeline_stride * (self.pipeline_model_parallel_size - 1)

    def broadcast_object(self, value: Any) -> Any:
        """The leader's `value`, which is picklable; called on all ranks."""
        holder = [value]
        dist.broadcast_object_list(holder, src=LEADER, group=self.control_group)
        return holder[0]

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, which are picklable, in the order of ranks; called on all ranks."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def broadcast_integers(self, values: torch.Tensor) -> None:
        """Overwrite the int64 CPU tensor `values` with the leader's; called on all ranks."""
        dist.broadcast(values, src=LEADER, group=self.control_group)


def init_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    *,
    seed: int = 1234,
    device: str | None = None,
    timeout_minutes: float = 30,
    options: Mapping[str, object] | None = None,
    lost_ranks: LostRankPolicy | None = None,
) -> ParallelContext:
    """Start torch.distributed and Megatron's model-parallel groups, and seed every generator.

    Under torchrun the environment gives rank and address; without it, a group of one is made, without a port.
    A torch.distributed that is already running is used as it is; Megatron's groups of another layout are replaced.
    The ranks compare their arguments before groups are made of them.

    Args:
        seed: for Python, numpy, torch and Megatron's model-parallel random states; from 0 to 2**32 - 1.
        device: "cpu" or "cuda"; by default CUDA where there is one.
        options: what else must be the same on all ranks, by name.
        lost_ranks: watch the other ranks from the start; by default a rank waits for them, for half an hour.

    Raises:
        LaunchError: the launcher's variables are wrong, or ranks are missing.
        UserError: the sizes do not fit the number of processes, there are fewer GPUs than local ranks, or the
            arguments are not the same on all ranks.
    """
    check_seed(seed)
    world_size = dist.get_world_size() if dist.is_initialized() else world_size_from_environment()
    check_layout(None, tensor_model_parallel_size, pipeline_model_parallel_size, world_size)
    chosen = _choose_device(device)
    _start_distributed(chosen, timedelta(minutes=timeout_minutes), lost_ranks)
    shut_down_at_exit()
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    check_same_on_all_ranks(_control_group(), {**sizes, "seed": seed, "version": __version__, **(options or {})})
    if chosen.type == "cuda":
        _check_gpus(chosen)
    prepare_megatron(chosen)

    from megatron.core import parallel_state

    if not _has_layout(tp, pp):
        _leave_model_parallel_groups()
        with gloo_groups_on_device_of(_control_group()):
            parallel_state.initialize_model_parallel(**sizes)
    seed_everything(seed)
    return current_context(chosen)


def _has_layout(tp: int, pp: int) -> bool:
    from megatron.core import parallel_state

    return (
        parallel_state.model_parallel_is_initialized()
        and parallel_state.get_tensor_model_parallel_world_size() == tp
        and parallel_state.get_pipeline_model_parallel_world_size() == pp
    )


def _leave_model_parallel_groups() -> None:
    """Destroy Megatron's process groups. Core's destroy_model_parallel only drops its references to them: about
    twenty groups, each with several threads over gloo."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD and group not in _control_groups.values():
                dist.destroy_process_group(group)


def current_context(device: torch.device | None = None) -> ParallelContext:
    """The context of Megatron's groups, after init_parallel or the caller has initialised them."""
    device = device or device_in_use()
    prepare_megatron(device)
    from megatron.core import parallel_state

    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank(),
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_model_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_model_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        control_group=_control_group(),
    )


def seed_everything(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's model-parallel random states (different per tensor rank)."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def check_seed(seed: int) -> None:
    """Raise UserError unless numpy accepts `seed` too (0 to 2**32 - 1, room for Megatron's offsets left)."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is not from 0 to {2**32 - 1}")


def shut_down_at_exit() -> None:
    """Call `shut_down` when the interpreter ends: otherwise gloo's threads abort the process."""
    atexit.unregister(shut_down)
    atexit.register(shut_down)


def shut_down() -> None:
    """Destroy all process groups.

    A gloo group's threads end when nothing refers to it any more; Python must still run then, whose lock they may take.
    """
    _control_groups.clear()
    parallel_state = sys.modules.get("megatron.core.parallel_state")  # not imported if the ranks have found a mistake
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        for name, value in list(vars(parallel_state).items()):
            if isinstance(value, dist.ProcessGroup):  # core 0.16 leaves some
                setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


def on_all_ranks(parallel: ParallelContext, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails with a UserError or an OSError on any, or for lack of memory, raise a
    UserError on all of them.

    Otherwise the ranks that succeed would wait forever for those that have raised an error.
    """
    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except OSError as error:
        name = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message = out_of_memory_message(error) or name
    except (MemoryError, RuntimeError) as error:
        message = out_of_memory_message(error)
        if message is None:
            raise
    for rank, text in enumerate(parallel.gather_objects(message)):
        if text is not None:
            others = f" (on rank {rank})" if rank else ""
            raise UserError(text + others)
    return result  # type: ignore[return-value]


def _choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch finds no CUDA GPU: use --device cpu")
    count = torch.cuda.device_count()
    index = local_rank() if count > 1 else 0  # a process to which the launcher has bound a GPU sees that one alone
    if index >= count:
        raise UserError(
            f"local rank {index} has no GPU of its own: this machine has {count}; "
            "start that many processes, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_gpus(device: torch.device) -> None:
    """Raise UserError on all ranks if two of them compute on one GPU, which nccl does not support."""
    if dist.get_world_size() == 1:
        return
    mine = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    gpus = [mine] * dist.get_world_size()
    dist.all_gather_object(gpus, mine, group=_control_group())
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            raise UserError(
                f"ranks {gpus.index(gpu)} and {rank} compute on one GPU of {gpu[0]}: start as many processes as it has "
                "GPUs, each with its LOCAL_RANK, or use --device cpu"
            )


def device_in_use() -> torch.device:
    """The device of a torch.distributed that is already running: its backend says which one its caller chose."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _start_distributed(device: torch.device, timeout: timedelta, lost_ranks: LostRankPolicy | None) -> None:
    if dist.is_initialized():
        return
    check_network_interfaces()
    backend = "nccl" if device.type == "cuda" else "gloo"
    launch = launch_environment()
    if launch is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = meet(launch, {"device": device.type}, timeout)
    if lost_ranks is not None:
        watch_ranks(store, launch, lost_ranks)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)


_control_groups: dict[int, dist.ProcessGroup] = {}


def _control_group() -> dist.ProcessGroup:
    # Made once for each world: a new gloo group costs a rendezvous.
    world = dist.group.WORLD
    assert world is not None, "torch.distributed has not been initialised"
    if id(world) not in _control_groups:
        _control_groups.clear()
        is_gloo = dist.get_backend() == "gloo"
        _control_groups[id(world)] = world if is_gloo else dist.new_group(backend="gloo")
    return _control_groups[id(world)]
