"""Tensors and generators of the device."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch

from .traffic import READ, launch, transfer

DEVICE = torch.device("cuda", 0)


class CudaTensor(torch.Tensor):
    """A tensor that says cuda:0; `held` is the CPU tensor beneath."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> CudaTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        tensor.held = held.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from .operations import dispatch  # which needs this class

        return dispatch(function, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: CudaTensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self) -> Any:
        transfer(READ, "tolist")
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        transfer(READ, "repr")
        return f"CudaTensor({self.held!r})"

    def numpy(self, **_: Any) -> NoReturn:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __reduce_ex__(self, protocol: int) -> Any:
        transfer(READ, "pickle")
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> CudaTensor:
        launch("clone")
        return CudaTensor(self.held.clone())


class CudaGenerator(torch.Generator):
    """Random numbers of the device: a CPU generator that says cuda:0."""

    def __init__(self) -> None:
        cuda_generators[self._cdata] = self

    @property
    def device(self) -> torch.device:
        return DEVICE


# Operations see another object for the same generator, which has the same `_cdata`.
cuda_generators: weakref.WeakValueDictionary[int, CudaGenerator] = weakref.WeakValueDictionary()
default_generator = CudaGenerator()


class _GeneratorMeta(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(metaclass=_GeneratorMeta):
    """What takes the place of `torch.Generator`: one for each kind of device."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch._C.Generator:
        return CudaGenerator() if torch.device(device).type == "cuda" else torch._C.Generator(device)


def is_cuda(value: Any) -> bool:
    return isinstance(value, CudaTensor)


def held(value: Any) -> Any:
    return value.held if is_cuda(value) else value


def wrapped(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, torch.Tensor) and not is_cuda(value) else value


def is_pinned(tensor: torch.Tensor) -> bool:
    return not is_cuda(tensor) and getattr(tensor.untyped_storage(), "is_simulated_pinned", False)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().is_simulated_pinned = True
    return tensor
