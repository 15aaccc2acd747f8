"""Files whose bytes are read when they are needed: tensors in them, and safetensors files.

Bytes are read with system calls and not through a memory map, so that a file that is truncated meanwhile ends in an
error; touching a page that a map has lost is a bus error, which ends the process.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import CheckpointError
from ...files import git_lfs_pointer, open_regular
from .blocks import Block, block_shape, contiguous_strides
from .lazy_tensor import LazyTensor, bytes_of, without_module_prefix

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I32": torch.int32}
_MOST_HEADER_BYTES = 16 * 2**20  # opt-175b's 1,541 tensors take 200 kB
_SMALL_GAP = 4096  # bytes that are read and thrown away rather than passed over by another system call


class TensorFile:
    """A regular file that is open for reading.

    Attributes:
        size: in bytes, when it was opened.

    Raises:
        CheckpointError: the file cannot be opened, is empty, or is what git shows where git-lfs has not fetched it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        if not self.size:
            raise CheckpointError(f"{path}: is empty")
        pointer = git_lfs_pointer(self.start(80))
        if pointer is not None:
            raise CheckpointError(f"{path}: {pointer}")

    def start(self, count: int) -> bytes:
        """The file's first `count` bytes, or all there are."""
        return bytes(bytes_of(self.tensor(0, min(count, self.size), torch.uint8)))

    def tensor(self, offset: int, num_elements: int, dtype: torch.dtype) -> Tensor:
        """[num_elements], read from byte `offset` on.

        Raises:
            CheckpointError: the elements are beyond the end of the file.
            OSError: the file cannot be read.
        """
        self.check_range(offset, num_elements * dtype.itemsize)
        values = torch.empty(num_elements, dtype=dtype)
        self.fill(bytes_of(values), offset)
        return values

    def check_range(self, offset: int, num_bytes: int) -> None:
        """Raise CheckpointError unless all these bytes are in the file."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size:
            raise CheckpointError(
                f"{self.path}: is damaged or incomplete: it has {self.size:,} bytes, "
                f"and bytes {offset:,} to {offset + num_bytes:,} are wanted"
            )

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Read as many bytes as the buffer holds, from byte `offset` on.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
            OSError: the file cannot be read.
        """
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                size = os.fstat(self._descriptor).st_size
                raise CheckpointError(
                    f"{self.path}: had {self.size:,} bytes when it was opened and has {size:,} now: "
                    "it was changed while it was read; try again when it is whole"
                )
            buffer, offset = buffer[count:], offset + count


@dataclass(eq=False)
class Storage:
    """Elements of one dtype that lie one after another in a file, from byte `start` on."""

    file: TensorFile
    start: int
    num_elements: int
    dtype: torch.dtype

    def byte(self, element: int) -> int:
        """Where an element begins in the file."""
        return self.start + element * self.dtype.itemsize

    def values(self, start: int, stop: int) -> Tensor:
        """The elements `start` to `stop`, [stop - start]."""
        return self.file.tensor(self.byte(start), stop - start, self.dtype)

    def rows(self, start: int, step: int, shape: tuple[int, int]) -> Tensor:
        """The first elements of several rows, [rows, columns]; the next row begins `step` elements further on."""
        values = torch.empty(shape, dtype=self.dtype)
        buffer, row_bytes = bytes_of(values), shape[1] * self.dtype.itemsize
        for row in range(shape[0]):
            self.file.fill(buffer[row * row_bytes : (row + 1) * row_bytes], self.byte(start + row * step))
        return values


class FileTensor(LazyTensor):
    """A tensor in a file: a storage with offset, shape and strides, all counted in elements."""

    def __init__(self, storage: Storage, offset: int, shape: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__(shape, storage.dtype)
        self.storage, self.offset, self.stride = storage, offset, tuple(stride)

    def read(self, block: Block) -> Tensor:
        """A new tensor, for which no more is read than the block and small gaps in it."""
        sizes = block_shape(block)
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype)
        start = self.offset + sum(part.start * step for part, step in zip(block, self.stride, strict=True))
        extents = [(size - 1) * step for size, step in zip(sizes, self.stride, strict=True)]
        stop, outer = start + sum(extents) + 1, extents.index(max(extents, default=0)) if extents else 0
        if extents and extents[outer]:
            inner = stop - start - extents[outer]  # elements between the first and the last one of an outer index
            is_dense = inner == math.prod(sizes) // sizes[outer]
            if is_dense and (self.stride[outer] - inner) * self.dtype.itemsize > _SMALL_GAP:
                rows = self.storage.rows(start, self.stride[outer], (sizes[outer], inner))
                strides = [inner if dim == outer else step for dim, step in enumerate(self.stride)]
                return rows.as_strided(sizes, strides)
        return self.storage.values(start, stop).as_strided(sizes, self.stride)


def open_safetensors(path: Path, *, integers: bool = False) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, not yet read.

    The library checks the header (names, dtypes, that offsets cover the file without overlap). The data is
    read here, since the library maps the file.

    Args:
        integers: there may be tensors of int32, too.

    Raises:
        CheckpointError: the file is damaged or incomplete, or a tensor has a dtype that OPT is not stored in.
    """
    file = TensorFile(path)
    try:
        length = int.from_bytes(file.start(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise SafetensorError(f"a header of {length:,} bytes, where {_MOST_HEADER_BYTES:,} are the most")
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
    except (SafetensorError, OSError, CheckpointError) as error:
        reason = error.args[0] if isinstance(error, SafetensorError) else error
        raise CheckpointError(
            f"{path}: is damaged or incomplete ({reason}); it has {file.size:,} bytes: fetch it again"
        ) from None
    header = json.loads(file.start(8 + length)[8:])
    dtypes = _SAFETENSORS_DTYPES | (_INTEGERS if integers else {})
    tensors = {name: _safetensors_tensor(file, name, header[name], 8 + length, dtypes) for name in names}
    return without_module_prefix(tensors)


def _safetensors_tensor(
    file: TensorFile, name: str, entry: dict[str, Any], data_start: int, dtypes: dict[str, torch.dtype]
) -> LazyTensor:
    dtype, shape = dtypes.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        kinds = ", ".join(dtypes)
        raise CheckpointError(f"{file.path}: {name} is stored as {entry['dtype']}; OPT is stored as {kinds}")
    storage = Storage(file, data_start + entry["data_offsets"][0], math.prod(shape), dtype)
    file.check_range(storage.start, storage.num_elements * dtype.itemsize)
    return FileTensor(storage, 0, shape, contiguous_strides(shape))
