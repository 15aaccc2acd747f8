"""Operations of torch, run on what the device's tensors hold, by the device's rules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from . import graphs
from .distributed import run_collective
from .tensors import CudaTensor, cuda_generators, default_generator, held, is_cuda, is_pinned, pin, wrapped
from .traffic import (
    ASYNCHRONOUS_READ,
    ASYNCHRONOUS_UPLOAD,
    READ,
    UPLOAD,
    WAIT,
    DeviceMismatch,
    host_operation,
    launch,
    refuse,
    transfer,
)

CPU = torch.device("cpu")

# Operations that launch nothing: other views of the same memory, and memory without content.
_FREE = {
    *("view", "_unsafe_view", "_reshape_alias", "as_strided", "alias", "detach", "lift_fresh", "resolve_conj"),
    *("t", "transpose", "permute", "movedim", "slice", "select", "narrow", "diagonal", "unfold", "unflatten"),
    *("unsqueeze", "squeeze", "expand", "unbind", "split", "split_with_sizes", "chunk", "view_as_real"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_pinned"),
}
# Operations that take no CPU scalar beside CUDA tensors (pointwise ones do).
_ALL_ON_ONE_DEVICE = {
    *("cat", "stack", "mm", "bmm", "addmm", "baddbmm", "index_select", "gather", "scatter", "embedding"),
    "native_layer_norm",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Operations(TorchDispatchMode):
    """Sees the operations of this thread that no CUDA tensor takes part in, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(function, args, kwargs or {})


def dispatch(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run one operation of torch on what its tensors hold, by the device's rules."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    namespace, name = function._schema.name.split("::")
    is_on_device = any(map(is_cuda, tensors))
    if namespace == "c10d":
        return run_collective(function, name, args, kwargs, tensors)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    goes_to_device = asked is not None and asked.type == "cuda"
    if not is_on_device and not goes_to_device:
        host_operation(name)
        return function(*args, **kwargs)
    if any(isinstance(leaf, torch._C.Generator) and leaf._cdata not in cuda_generators for leaf in leaves):
        refuse(DeviceMismatch, f"{function}: Expected a 'cuda' device type for generator but found 'cpu'")
    if goes_to_device:
        kwargs = {**kwargs, "device": CPU, "pin_memory": False} if "pin_memory" in kwargs else {**kwargs, "device": CPU}
    held_args, held_kwargs = tree_map(held, args), tree_map(held, kwargs)
    if name == "_local_scalar_dense":
        transfer(READ, "item")
        return function(*held_args, **held_kwargs)
    if name == "_to_copy":
        return _move(function, held_args, held_kwargs, is_on_device, asked)
    if name == "copy_":
        return _copy(function, args, held_args, held_kwargs)
    _refuse_two_devices(function, name, args, tensors)
    _note_hidden_waits(function, name, args)
    if name in _FREE:
        result = function(*held_args, **held_kwargs)
    else:
        launch(name)
        with _device_random_numbers(function):
            result = graphs.run(function, held_args, held_kwargs)
    if asked is not None and not goes_to_device:  # new_zeros(..., device="cpu") of a CUDA tensor
        return result
    if torch.Tag.inplace_view in function.tags:  # what args[0] holds has another shape now
        args[0].data = CudaTensor(args[0].held)
        return args[0]
    result = tree_map(wrapped, result)
    if is_on_device and any(argument.alias_info is not None for argument in function._schema.arguments):
        return return_and_correct_aliasing(function, args, kwargs, result)
    return result


def _move(function: Any, args: tuple, kwargs: dict, is_on_device: bool, asked: torch.device | None) -> torch.Tensor:
    """`to`, `cpu`, `cuda`, and casts."""
    does_not_block = kwargs.get("non_blocking", False)
    if not is_on_device:
        is_free = does_not_block and is_pinned(args[0])
        transfer(ASYNCHRONOUS_UPLOAD if is_free else UPLOAD, "to")
    elif asked is not None and asked.type == "cpu":  # torch reads into pinned memory if it need not wait
        transfer(ASYNCHRONOUS_READ if does_not_block else READ, "cpu")
        result = function(*args, **kwargs)
        return pin(result) if does_not_block else result
    elif asked is None or asked.type == "cuda":
        launch("_to_copy")
    moved = graphs.run(function, args, kwargs)
    return moved if moved.is_meta else CudaTensor(moved)


def _copy(function: Any, args: tuple, held_args: tuple, kwargs: dict) -> torch.Tensor:
    target, source = args[:2]
    does_not_block = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if is_cuda(target) and is_cuda(source):
        launch("copy_")
    elif is_cuda(target):
        transfer(ASYNCHRONOUS_UPLOAD if does_not_block and is_pinned(source) else UPLOAD, "copy_")
    else:
        transfer(ASYNCHRONOUS_READ if does_not_block and is_pinned(target) else READ, "copy_")
    graphs.run(function, held_args, kwargs)
    return target


def _refuse_two_devices(function: Any, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    on_cpu = [tensor for tensor in tensors if not is_cuda(tensor) and not tensor.is_meta]
    if name in _INDEXING and is_cuda(args[0]):
        for index in args[1]:
            if index is not None and not is_cuda(index):
                transfer(UPLOAD, "index on the CPU")
        on_cpu = [value for value in args[2:3] if not is_cuda(value)]
    if on_cpu and len(on_cpu) < len(tensors) and (name in _ALL_ON_ONE_DEVICE or any(t.dim() > 0 for t in on_cpu)):
        text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        refuse(DeviceMismatch, f"{function}: {text}")


def _note_hidden_waits(function: Any, name: str, args: tuple) -> None:
    if torch.Tag.dynamic_output_shape in function.tags and name not in _INDEXING:
        transfer(WAIT, name)
    elif torch.Tag.data_dependent_output in function.tags:  # equal
        transfer(READ, name)
    elif name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        value = args[2] if len(args) > 2 else None
        is_fill = len(indices) == 1 and value is not None and not is_cuda(value)  # tensor[mask] = number: masked_fill
        if not is_fill and any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            transfer(WAIT, "bool index")


@contextlib.contextmanager
def _device_random_numbers(function: Any) -> Iterator[None]:
    """Operations that draw from the default generator draw from the device's instead."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        yield
        return
    host_state = torch.default_generator.get_state()
    torch.default_generator.set_state(default_generator.get_state())
    try:
        yield
    finally:
        default_generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(host_state)
