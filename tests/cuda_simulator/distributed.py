"""torch.distributed: groups that say nccl and are gloo."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from . import graphs
from .tensors import DEVICE, held, is_cuda
from .traffic import DeviceMismatch, launch, line, refuse, violations

CPU = torch.device("cpu")

_backend_of_group: dict[str, str] = {}


def run_collective(function: Any, name: str, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
    """Run an operation of a group on what its tensors hold, if its backend takes them."""
    backend = _backend_of_group.get(_group_name(args), "gloo")
    is_on_device = any(map(is_cuda, tensors))
    if backend == "nccl" and name != "barrier" and not all(map(is_cuda, tensors)):
        refuse(DeviceMismatch, f"{function}: a CPU tensor over nccl")
    if is_on_device:
        if backend == "gloo":
            violations.append(f"{function}: a CUDA tensor over gloo, at {line()}")
        launch(f"c10d.{name}")
    written = [held(tensor) for tensor in tensors]
    result = graphs.run(function, tree_map(held, args), tree_map(held, kwargs), written)
    if is_on_device and isinstance(result, (tuple, list)):  # (tensors, work): they were changed in place
        return type(result)([args[0], *result[1:]])
    return result


def _group_name(args: tuple) -> str | None:
    for value in tree_leaves(args):
        if isinstance(value, torch.ScriptObject):
            with contextlib.suppress(Exception):  # an operation's other arguments are script objects, too
                return dist.ProcessGroup.unbox(value).group_name
    return None


def install_distributed() -> None:
    """Groups that say nccl and are gloo."""
    start, make_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        start("gloo", *args, **kwargs)
        _backend_of_group[dist.group.WORLD.group_name] = backend or "nccl"

    def new_group(ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        group = make_group(ranks, *args, backend="gloo", **kwargs)
        if isinstance(group, dist.ProcessGroup):
            _backend_of_group[group.group_name] = backend or get_backend()
        return group

    def get_backend(group: Any = None) -> str:
        return _backend_of_group.get((group or dist.group.WORLD).group_name, "gloo")

    def device_of_group(group: Any = None) -> torch.device:
        return DEVICE if get_backend(group) == "nccl" else CPU

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group, module.get_backend = init_process_group, new_group, get_backend
    dist.distributed_c10d._get_object_coll_device = lambda group=None: device_of_group(group).type
    dist.distributed_c10d._get_pg_default_device = device_of_group
