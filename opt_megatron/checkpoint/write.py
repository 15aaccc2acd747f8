"""Writes a conversion's weight files in bounded memory: one pass over the source, in blocks of rows.

Every canonical tensor is read once, a few rows at a time, cast if asked for, hashed, and written to each of its
destinations. Memory holds a few blocks for each worker, whatever the model's size. Workers are threads:
reading, casting, hashing and writing all release the interpreter's lock.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ..errors import UserError
from .checkpoint import Checkpoint
from .output_files import OutputFile, StoredTensor
from .storage.blocks import BLOCK_BYTES, Block, whole
from .storage.lazy_tensor import bytes_of
from .storage.torch_writer import TensorPlaceholder, create_torch_file

# Larger writes make the kernel look for larger pages, and take up to four times as long.
_WRITE_BYTES = 2**18
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


@dataclass(frozen=True)
class Destination:
    """Where a block of a canonical tensor is written: its rows, one after another, from byte `offset` of a file."""

    path: Path
    offset: int
    block: Block
    dtype: torch.dtype


Destinations = dict[str, list[Destination]]  # canonical name -> everywhere that its values are written


def create_files(directory: Path, files: list[OutputFile]) -> tuple[Destinations, bool]:
    """Create every file with holes for its tensors, and write the constants.

    Returns:
        The destinations of the canonical tensors, and whether every file existed with the size that it has now.
    """
    destinations: Destinations = defaultdict(list)
    complete = True
    for file in files:
        path = directory / file.path
        size_before = path.stat().st_size if path.is_file() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        offsets = _create_torch(path, file) if file.kind == "torch" else _create_safetensors(path, file.tensors)
        for stored, offset in zip(file.tensors, offsets, strict=True):
            if stored.constant is not None:
                _write_at(path, offset, stored.constant)
            for source in stored.blocks:
                start = offset + source.start * stored.dtype.itemsize
                destinations[source.name].append(Destination(path, start, source.block, stored.dtype))
        complete &= path.stat().st_size == size_before
    return destinations, complete


def _create_torch(path: Path, file: OutputFile) -> list[int]:
    placeholders = {stored.name: TensorPlaceholder(stored.shape, stored.dtype) for stored in file.tensors}
    offsets = create_torch_file(path, file.wrap(placeholders))
    return [offsets[id(placeholders[stored.name])] for stored in file.tensors]


def _create_safetensors(path: Path, tensors: tuple[StoredTensor, ...]) -> list[int]:
    """Write the header of safetensors (8 bytes of length, then JSON), and leave a hole for the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for stored in tensors:
        ends.append(ends[-1] + stored.num_bytes)
        entry = {"dtype": _SAFETENSORS_NAMES[stored.dtype], "shape": stored.shape, "data_offsets": ends[-2:]}
        header[stored.name] = entry
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.touch()
    with path.open("r+b") as file:  # the data that an interrupted run has written stays
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + ends[-1])
    return [8 + len(encoded) + end for end in ends[:-1]]


def _write_at(path: Path, offset: int, tensor: Tensor) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes_of(tensor))


def write_tensors(
    checkpoint: Checkpoint,
    destinations: Destinations,
    *,
    workers: int,
    done: dict[str, str],
    on_tensor: Callable[[str, str, int], None],
    progress: Callable[[int], None],
) -> None:
    """Write every canonical tensor to its destinations.

    Args:
        done: hashes of the tensors that have been written before and are skipped.
        on_tensor: called in this thread with name, hash and size of each tensor that is complete.
        progress: called with the number of bytes written since the last call, from any thread.

    Raises:
        CheckpointError: the source is damaged.
        OSError: a file cannot be written.
    """
    descriptors = {path: os.open(path, os.O_WRONLY) for path in {d.path for ds in destinations.values() for d in ds}}
    try:
        names = [name for name in checkpoint.tensors if name not in done]
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(_copy, checkpoint, n, destinations[n], descriptors, progress): n for n in names}
            try:
                for future in concurrent.futures.as_completed(futures):
                    digest, num_bytes = future.result()
                    on_tensor(futures[future], digest, num_bytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _copy(
    checkpoint: Checkpoint,
    name: str,
    destinations: list[Destination],
    descriptors: dict[Path, int],
    progress: Callable[[int], None],
) -> tuple[str, int]:
    """Copy one canonical tensor to its destinations; returns the hash of its bytes as written, and bytes written."""
    digest, total = xxhash.xxh3_128(), 0
    for first, values in row_blocks(checkpoint, name, destinations[0].dtype):
        digest.update(bytes_of(values))
        written = sum(_write_rows(values, first, d, descriptors[d.path]) for d in destinations)
        total += written
        progress(written)
    return digest.hexdigest(), total


def _write_rows(values: Tensor, first: int, destination: Destination, descriptor: int) -> int:
    """Write the rows of `values` that belong to the destination; `first` is the number of the first row.

    Returns:
        the number of bytes written.
    """
    rows, columns = destination.block[0], destination.block[1:]
    start, stop = max(rows.start, first), min(rows.stop, first + len(values))
    if start >= stop:
        return 0
    wanted = values[(slice(start - first, stop - first), *columns)]
    content = bytes_of(wanted)
    row_bytes = wanted[0].numel() * destination.dtype.itemsize
    _pwrite(descriptor, content, destination.offset + (start - rows.start) * row_bytes)
    return len(content)


def _pwrite(descriptor: int, content: memoryview, offset: int) -> None:
    while len(content):
        written = os.pwrite(descriptor, content[:_WRITE_BYTES], offset)
        content, offset = content[written:], offset + written


def row_blocks(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
    """A canonical tensor in blocks of rows of at most BLOCK_BYTES: (first row, values), contiguous, in `dtype`."""
    lazy = checkpoint.tensors[name]
    row_bytes = max(1, torch.Size(lazy.shape[1:]).numel() * lazy.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, lazy.shape[0], step):
        block = (slice(first, min(first + step, lazy.shape[0])), *whole(lazy.shape)[1:])
        values = checkpoint.read(name, block)
        yield first, _cast(values, dtype or lazy.dtype, name).contiguous()


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The values in another dtype.

    Raises:
        UserError: a finite value is too large for float16.
    """
    cast = values.to(dtype)
    if dtype is torch.float16 and values.dtype is not dtype and (cast.isinf() & values.isfinite()).any():
        largest = float(values[values.isfinite()].abs().max())
        raise UserError(f"{name} holds {largest:.4g}, and float16 ends at 65504: use --dtype bfloat16 or float32")
    return cast


def tensor_hash(checkpoint: Checkpoint, name: str) -> str:
    """xxh3-128 of a canonical tensor's bytes, row by row and little-endian, independent of format and layout."""
    digest = xxhash.xxh3_128()
    for _, values in row_blocks(checkpoint, name):
        digest.update(bytes_of(values))
    return digest.hexdigest()
