"""The table of linear methods, and the choice among them. Imports no torch until a method is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UserError

if TYPE_CHECKING:
    import torch

    from .base import LinearMethod


class Quantization(NamedTuple):
    """What --quantization offers under one name.

    Attributes:
        help: of --quantization.
        methods: module and class of the linear methods that do it; the first that is available is used. A module that
            needs a package which is not installed is passed over.
        group_sizes: inputs that may share a scale, which the name can end in ("int4-g64"); none: there are no groups.
        bytes_per_weight: of a linear layer, scales not counted.
    """

    help: str
    methods: tuple[str, ...]
    group_sizes: tuple[int, ...] = ()
    bytes_per_weight: float = 1


_OPTIONAL_PACKAGES = ("triton",)  # comes with torch's builds for CUDA

METHODS: dict[str | None, Quantization] = {  # by --quantization's names; None: without it
    None: Quantization(
        "the weights as they are",
        ("cpu_float.CPUFloatLinear", "onednn.OneDNNLinear", "torch_linear.TorchLinear"),
    ),
    "int8": Quantization(
        "8-bit weights, quantised while loading; a quarter of float32's memory",
        (
            "cpu_int8.CPUInt8Linear",
            "int8.Int8Linear",
            "int8_triton.Int8TritonLinear",
            "int8_weight_only.Int8WeightOnlyLinear",
        ),
    ),
    "int4": Quantization(
        "4-bit weights in groups (--group-size), 8 bits for embedding and output head",
        ("cpu_int4.CPUInt4Linear", "int4_triton.Int4TritonLinear", "int4_weight_only.Int4WeightOnlyLinear"),
        group_sizes=(32, 64, 128),
        bytes_per_weight=0.5,
    ),
}

# Methods for weights of another dtype than the model's parameters, which is float32, by that dtype.
_STORING = {"torch.float16": "cpu_float.CPUFloat16Linear", "torch.bfloat16": "cpu_float.CPUBFloat16Linear"}


def quantizations() -> tuple[str, ...]:
    """The names that a user can choose from."""
    return tuple(name for name in METHODS if name is not None)


def quantization_help() -> str:
    """The help of --quantization."""
    names = quantizations()
    if len(names) == 1:
        return METHODS[names[0]].help
    return ". ".join(f"{name}: {METHODS[name].help}" for name in names)


def group_sizes() -> tuple[int, ...]:
    """The sizes that --group-size offers."""
    return tuple(sorted({size for each in METHODS.values() for size in each.group_sizes}))


def with_group_size(quantization: str | None, group_size: int | None) -> str | None:
    """The name of a quantisation with groups of this size.

    Raises:
        UserError: it has no groups.
    """
    if group_size is None:
        return quantization
    if quantization not in METHODS or not METHODS[quantization].group_sizes:
        grouped = [name for name in quantizations() if METHODS[name].group_sizes]
        raise UserError(f"a group size needs a quantization with groups ({', '.join(grouped)}), not {quantization}")
    return f"{quantization}-g{group_size}"


def bytes_per_weight(quantization: str) -> float:
    """Of a linear layer, scales not counted.

    Raises:
        UserError: there is no such quantisation.
    """
    return _parts(quantization)[0].bytes_per_weight


def _parts(quantization: str | None) -> tuple[Quantization, str]:
    """Its entry, and the group size in its name, or nothing."""
    name, dash, size = (None, "", "") if quantization is None else quantization.partition("-g")
    if name not in METHODS or (dash and size not in map(str, METHODS[name].group_sizes)):
        choices = list(quantizations())
        choices += [f"{name}-g{size}" for name in quantizations() for size in METHODS[name].group_sizes]
        raise UserError(f"quantization {quantization!r}: choose {', '.join(choices)} or none")
    return METHODS[name], size


def methods_for(quantization: str | None) -> Iterator[type[LinearMethod]]:
    """The methods of one name, the preferred one first; each module is imported when its turn comes.

    Raises:
        UserError: there is no such quantisation.
    """
    entry, group_size = _parts(quantization)
    for path in entry.methods:
        try:
            method = _imported(path)
            yield method.with_group_size(int(group_size)) if group_size else method
        except ModuleNotFoundError as error:
            if error.name not in _OPTIONAL_PACKAGES:
                raise


def _imported(path: str) -> type[LinearMethod]:
    module, _, name = path.partition(".")
    method: type[LinearMethod] = getattr(import_module(f".{module}", __package__), name)
    return method


def can_store(weight_dtype: torch.dtype, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of `dtype` on `device` can keep its weights in another dtype."""
    path = _STORING.get(str(weight_dtype))
    return path is not None and _imported(path).is_available(device, dtype)


def select_method(
    quantization: str | None, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> type[LinearMethod]:
    """The method for float weights of `dtype` on `device`.

    Args:
        quantization: one of `quantizations()`, or with a group size; None for a method that changes no weight.
        weight_dtype: that weights are kept in without a quantisation, where it is not `dtype` (`can_store`).

    Raises:
        UserError: there is no such quantisation, or no method for it on this device.
    """
    if quantization is None and weight_dtype is not None:
        return _imported(_STORING[str(weight_dtype)])
    for method in methods_for(quantization):
        if method.is_available(device, dtype):
            return method
    raise UserError(f"quantization {quantization!r} is not available for {dtype} on {device.type}")
