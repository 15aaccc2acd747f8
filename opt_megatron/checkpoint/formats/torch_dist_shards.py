"""The tensors of a torch_dist directory, found through its index.

Where the shards are is in `.metadata`, a pickle of torch's own classes; training writes the same as
`tensors.json`, so that nothing has to be unpickled to read it:

    {"decoder.layers.mlp.linear_fc1.weight": {"shape": [L, 4h, h], "dtype": "float32", "chunks":
        [{"offsets": [0, 0, 0], "sizes": [1, 2h, h], "file": "__0_0.distcp", "start": 0, "length": 9041}, ...]}}

A parameter of all layers is one tensor with the layer as its first dimension, as megatron-core saves it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import DTYPES
from ...errors import CheckpointError, shorten
from ...files import read_text
from ..storage.blocks import Block, contiguous_strides
from ..storage.lazy_tensor import Concatenated, LazyTensor
from ..storage.mmap import MappedFile
from ..storage.torch_reader import FileSpan, FileTensor, TorchFile

INDEX_FILE = "tensors.json"
_LAYERS = "decoder.layers."


class ShardedTensors:
    """The tensors of one directory under megatron-core's names.

    Raises:
        CheckpointError: the index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = _read_index(path / INDEX_FILE)
        self._files: dict[str, MappedFile] = {}

    def find(self, name: str) -> LazyTensor | None:
        """A parameter, or None if it is not stored; "decoder.layers.3.…" may be layer 3 of "decoder.layers.…".

        Raises:
            CheckpointError: the index or a file is damaged.
        """
        layer = None
        if name.startswith(_LAYERS) and name not in self._index:
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            name, layer = _LAYERS + rest, int(number)
        entry = self._index.get(name)
        if entry is None:
            return None
        try:
            return self._assemble(entry, layer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self._path / INDEX_FILE}: the entry of {name} is not valid: {error!r}") from None

    def _assemble(self, entry: dict[str, Any], layer: int | None) -> LazyTensor:
        shape, dtype = [int(size) for size in entry["shape"]], str(entry["dtype"])
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype[:20]!r}")
        chunks = entry["chunks"]
        skip = 0 if layer is None else 1
        if skip:
            chunks = [chunk for chunk in chunks if chunk["offsets"][0] == layer]
        shards: dict[tuple[int, ...], LazyTensor] = {}
        for chunk in chunks:
            offsets, sizes = tuple(chunk["offsets"][skip:]), tuple(chunk["sizes"][skip:])
            shards[offsets] = _Shard(self._span(chunk), sizes, getattr(torch, dtype), skip)
        dims = [dim for dim in range(len(shape) - skip) if len({offsets[dim] for offsets in shards}) > 1]
        if not shards or len(dims) > 1:
            raise ValueError("its shards are missing or do not lie along one dimension")
        pieces = [shards[offsets] for offsets in sorted(shards)]
        tensor = pieces[0] if len(pieces) == 1 else Concatenated(pieces, dims[0])
        if list(tensor.shape) != shape[skip:]:
            raise ValueError(f"its shards make up {list(tensor.shape)} of {shape[skip:]}")
        return tensor

    def _span(self, chunk: dict[str, Any]) -> FileSpan:
        name, start, length = chunk["file"], int(chunk["start"]), int(chunk["length"])
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError("a file outside the directory")
        if name not in self._files:
            if not (self._path / name).is_file():
                raise CheckpointError(f"{self._path}: {shorten([name])} is missing")
            self._files[name] = MappedFile(self._path / name)
        file = self._files[name]
        if start < 0 or length < 0 or start + length > file.size:
            raise CheckpointError(
                f"{self._path / name}: is damaged or incomplete: it has {file.size:,} bytes, "
                f"and bytes {start:,} to {start + length:,} are wanted"
            )
        return FileSpan(file, start, length)


class _Shard(LazyTensor):
    """The tensor in a span of a file, which is opened when it is first read.

    Args:
        skip: number of leading dimensions of size 1 that only the stored tensor has.
    """

    def __init__(self, span: FileSpan, shape: tuple[int, ...], dtype: torch.dtype, skip: int) -> None:
        super().__init__(shape, dtype)
        self._span, self._skip = span, skip
        self._opened: FileTensor | None = None

    def read(self, block: Block) -> Tensor:
        """A new tensor, from the rows of the block."""
        stored = self._tensor()
        row = math.prod(self.shape[1:])
        first = stored.offset + block[0].start * row
        values = stored.storage.values(first, first + (block[0].stop - block[0].start) * row)
        return values.view(block[0].stop - block[0].start, *self.shape[1:])[(slice(None), *block[1:])]

    def _tensor(self) -> FileTensor:
        if self._opened is None:
            path = self._span.file.path
            content = TorchFile(path, self._span).content
            expected = (1,) * self._skip + self.shape
            if not isinstance(content, FileTensor) or content.shape != expected:
                raise CheckpointError(
                    f"{path}: holds something else than a tensor of {list(expected)} where one is wanted"
                )
            if content.stride[self._skip :] != contiguous_strides(self.shape) or content.storage.dtype != self.dtype:
                raise CheckpointError(f"{path}: a tensor of {list(expected)} does not lie there as its index says")
            self._opened = content
        return self._opened


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(index, dict):
        raise CheckpointError(f"{path}: holds a {type(index).__name__}, not an object")
    return index
