"""Files that are mapped into memory, read-only: tensors are views of a file, read when they are touched.

Pages that were touched count as resident until they are released. They belong to the page cache, are shared by all
processes that map the file, and are never written.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError
from .lazy_tensor import LazyTensor, WrappedTensor, without_module_prefix

# The first line of a pointer (git-lfs, docs/spec.md).
_GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedFile:
    """A whole file as a read-only view.

    Raises:
        CheckpointError: the file cannot be opened, is empty, or is what git shows where git-lfs has not fetched it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._array = np.memmap(path, mode="r")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise CheckpointError(f"{path}: is empty") from None
        self.size = len(self._array)
        if self._array[: len(_GIT_LFS_POINTER)].tobytes() == _GIT_LFS_POINTER:
            raise CheckpointError(
                f"{path}: is a git-lfs pointer of {self.size} bytes, not the weights: run `git lfs pull` in its "
                "repository, or download this file"
            )
        with warnings.catch_warnings():  # torch warns that the memory is read-only; that is the intention
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.from_numpy(self._array)

    def tensor(self, offset: int, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements] view of the file from byte `offset`; a copy if that is not aligned to the dtype.

        Raises:
            CheckpointError: the elements are beyond the end of the file.
        """
        stop = offset + num_elements * dtype.itemsize
        if offset < 0 or num_elements < 0 or stop > self.size:
            raise CheckpointError(
                f"{self.path}: is damaged or incomplete: it has {self.size:,} bytes, "
                f"and bytes {offset:,} to {stop:,} are wanted"
            )
        if offset % dtype.itemsize:
            return self._bytes[offset:stop].clone().view(dtype)  # torch cannot view unaligned memory
        return self._bytes[offset:stop].view(dtype)

    def release(self, tensor: Tensor) -> None:
        """Release the pages under a tensor of this file; they are read again if it is touched again."""
        start = tensor.data_ptr() - self._bytes.data_ptr()
        stop = (
            start + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.itemsize
        )
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that are shared with a neighbour stay
        length = (min(stop, self.size) - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if 0 <= start < self.size and length > 0:
            # numpy's stubs do not declare the mmap object that a memmap holds.
            self._array._mmap.madvise(mmap.MADV_DONTNEED, first, length)  # type: ignore[attr-defined]

    def lazy_tensor(self, tensor: Tensor) -> LazyTensor:
        """A lazy tensor for a tensor of this file."""
        return WrappedTensor(tensor.shape, tensor.dtype, lambda: tensor, self.release)


def map_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, not yet read.

    The library checks the header (names, dtypes, that offsets cover the file without overlap). The data is
    mapped here, since the library returns copies only.

    Raises:
        CheckpointError: the file is damaged or incomplete, or a tensor has a dtype that OPT is not stored in.
    """
    mapped = MappedFile(path)
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: is damaged or incomplete ({error}); it has {mapped.size:,} bytes: fetch it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return without_module_prefix({name: _safetensors_tensor(mapped, name, header[name], 8 + length) for name in names})


def _safetensors_tensor(mapped: MappedFile, name: str, entry: dict[str, Any], data_start: int) -> LazyTensor:
    dtype, shape = _SAFETENSORS_DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        kinds = ", ".join(_SAFETENSORS_DTYPES)
        raise CheckpointError(f"{mapped.path}: {name} is stored as {entry['dtype']}; OPT is stored as {kinds}")
    flat = mapped.tensor(data_start + entry["data_offsets"][0], math.prod(shape), dtype)
    return mapped.lazy_tensor(flat.view(shape))
