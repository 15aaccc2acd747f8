"""Compares a checkpoint with its manifest, or two checkpoints of any formats with each other, tensor by tensor."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..config import dtype_name
from .checkpoint import Checkpoint
from .manifest import read_manifest
from .storage.blocks import whole
from .storage.lazy_tensor import bitwise_equal
from .write import row_blocks, tensor_hash


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs, and in what."""

    name: str
    what: str


def differences_from_manifest(
    checkpoint: Checkpoint, *, workers: int = 2, progress: Callable[[int], None] = lambda n: None
) -> list[TensorDifference]:
    """Hash every canonical tensor and compare with the manifest in the directory.

    Args:
        progress: called with the bytes read since the last call.

    Raises:
        CheckpointError: there is no manifest, or a file is damaged.
    """
    entries = read_manifest(checkpoint.path).tensors

    def check(name: str) -> TensorDifference | None:
        tensor, entry = checkpoint.tensors.get(name), entries.get(name)
        if tensor is None or entry is None:
            return TensorDifference(name, "is only in the manifest" if tensor is None else "is not in the manifest")
        found = list(tensor.shape), dtype_name(tensor.dtype)
        if found != (entry["shape"], entry["dtype"]):
            return TensorDifference(
                name, f"is {found[1]} {found[0]}, the manifest says {entry['dtype']} {entry['shape']}"
            )
        digest = tensor_hash(checkpoint, name)
        progress(tensor.num_bytes)
        return None if digest == entry["xxh3_128"] else TensorDifference(name, "has other bytes than the manifest says")

    return _in_parallel(check, dict.fromkeys([*checkpoint.tensors, *entries]), workers)


def differences_between(
    left: Checkpoint, right: Checkpoint, *, workers: int = 2, progress: Callable[[int], None] = lambda n: None
) -> list[TensorDifference]:
    """Compare two checkpoints tensor by tensor, to the bit.

    Args:
        progress: called with the bytes read since the last call.

    Raises:
        CheckpointError: a file is damaged.
    """

    def check(name: str) -> TensorDifference | None:
        a, b = left.tensors.get(name), right.tensors.get(name)
        if a is None or b is None:
            return TensorDifference(name, "is only in the first" if b is None else "is only in the second")
        if a.shape != b.shape:
            return TensorDifference(name, f"is {list(a.shape)} in the first and {list(b.shape)} in the second")
        difference = _difference_of_values(left, right, name)
        progress(a.num_bytes)
        return difference

    return _in_parallel(check, dict.fromkeys([*left.tensors, *right.tensors]), workers)


def _difference_of_values(left: Checkpoint, right: Checkpoint, name: str) -> TensorDifference | None:
    count, largest = 0, 0.0
    dtypes = [dtype_name(checkpoint.tensors[name].dtype) for checkpoint in (left, right)]
    same_dtype = dtypes[0] == dtypes[1]
    for a, b in _pairs_of_blocks(left, right, name):
        if bitwise_equal(a, b):
            continue
        different = _bits(a) != _bits(b) if same_dtype else _values_differ(a.double(), b.double())
        count += int(different.sum())
        gaps = (a.double() - b.double()).abs()[different]
        largest = max(largest, float(gaps[~gaps.isnan()].max())) if (~gaps.isnan()).any() else largest
    cast = "" if same_dtype else f"is {dtypes[0]} in the first and {dtypes[1]} in the second"
    if count:
        total = left.tensors[name].num_elements
        values = f"differs in {count:,} of {total:,} values, by at most {largest:.3g}"
        return TensorDifference(name, f"{cast}, and {values}" if cast else values)
    return TensorDifference(name, cast + ", with equal values") if cast else None


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def _values_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a != b) & ~(a.isnan() & b.isnan())


def _pairs_of_blocks(left: Checkpoint, right: Checkpoint, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first, values in row_blocks(left, name):
        block = (slice(first, first + len(values)), *whole(values.shape)[1:])
        yield values, right.read(name, block).to(right.tensors[name].dtype).contiguous()


def _in_parallel(
    check: Callable[[str], TensorDifference | None], names: Iterable[str], workers: int
) -> list[TensorDifference]:
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [difference for difference in pool.map(check, names) if difference is not None]
