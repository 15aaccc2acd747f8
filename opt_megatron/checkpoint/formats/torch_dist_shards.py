"""The tensors of a torch_dist directory as lazy tensors, put together from the shards that `.metadata` lists.

A parameter of all layers is one tensor with the layer as its first dimension, unless the layers were saved one by one:

    decoder.layers.mlp.linear_fc1.weight [L, F, H]      decoder.layers.3.mlp.linear_fc1.weight [F, H]

Shards tile their tensor: a layer, and within it the part of a tensor parallel rank.

What is not sharded (the common state) is an object beside the tensors, or before megatron-core 0.19 common.pt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import MOST_LAYERS
from ...errors import CheckpointError
from ..storage.blocks import Block, contiguous_strides
from ..storage.lazy_tensor import Concatenated, LazyTensor, RemappedTensor
from ..storage.tensor_file import FileTensor, TensorFile
from ..storage.torch_reader import FileSpan, TorchFile
from .dcp_metadata import METADATA_FILE, ByteRange, TensorEntry, read_metadata

_LAYERS = "decoder.layers."
_COMMON = "common_state/shard_0_1"  # dist_checkpointing/serialization.py: a ShardedObject of one shard


def read_directory(directory: Path) -> tuple[dict[str, LazyTensor], Any]:
    """The tensors, not yet read, each layer's under its number (decoder.layers.3.mlp. ...), and the common state.

    Raises:
        CheckpointError: `.metadata` is damaged, or the shards or the common state are not all there.
    """
    files, contents = _Files(directory), read_metadata(directory, [_COMMON])
    return _layers_apart(directory, contents.tensors, files), _common_state(directory, contents.objects, files)


def _common_state(directory: Path, objects: dict[str, ByteRange], files: _Files) -> Any:
    path = directory / "common.pt"
    if path.is_file():  # core, too, looks for it first
        return TorchFile(path).content
    if _COMMON not in objects:
        raise CheckpointError(f"{directory}: {path.name} is missing, and {METADATA_FILE} names no common state")
    span = files.span(objects[_COMMON])
    content = TorchFile(span.file.path, span).content
    return content[0] if isinstance(content, list) and content else content


def _layers_apart(directory: Path, entries: dict[str, TensorEntry], files: _Files) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for name, entry in entries.items():
        tensor = _assemble(name, entry, files)
        rest = name.removeprefix(_LAYERS)
        if rest == name or rest.split(".")[0].isdigit():
            tensors[name] = tensor
        elif tensor.shape[0] > MOST_LAYERS:
            raise CheckpointError(f"{directory}: {name} is of {tensor.shape[0]:,} layers; {MOST_LAYERS:,} are the most")
        else:
            tensors |= {f"{_LAYERS}{layer}.{rest}": _Layer(tensor, layer) for layer in range(tensor.shape[0])}
    return tensors


class _Layer(RemappedTensor):
    """One layer of a tensor that holds a parameter of all of them."""

    def __init__(self, stacked: LazyTensor, number: int) -> None:
        super().__init__(stacked, stacked.shape[1:])
        self._number = number

    def _remap(self, block: Block) -> Block:
        return (slice(self._number, self._number + 1), *block)

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        return values[0]


class _Files:
    """The files of a directory, each opened once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[str, TensorFile] = {}

    def span(self, stored: ByteRange) -> FileSpan:
        """These bytes of a file of the directory.

        Raises:
            CheckpointError: the file is missing, or does not have them.
        """
        if stored.file not in self._opened:
            self._opened[stored.file] = TensorFile(self.directory / stored.file)
        file = self._opened[stored.file]
        file.check_range(stored.start, stored.length)
        return FileSpan(file, stored.start, stored.length)


def _assemble(name: str, entry: TensorEntry, files: _Files) -> LazyTensor:
    """The whole tensor.

    Raises:
        CheckpointError: its chunks leave gaps or overlap.
    """
    shards = [(chunk.offsets, _Shard(files.span(chunk.stored), chunk.sizes, entry.dtype)) for chunk in entry.chunks]
    tensor = _join(shards, 0, len(entry.shape))
    if tensor is None or tensor.shape != entry.shape:
        raise CheckpointError(f"{files.directory}: the shards of {name} do not make up a tensor of {list(entry.shape)}")
    return tensor


def _join(shards: list[tuple[tuple[int, ...], _Shard]], dim: int, num_dims: int) -> LazyTensor | None:
    """Join what lies at equal offsets of the dimensions before `dim`; None if something is missing or there twice."""
    if dim == num_dims:
        return shards[0][1] if len(shards) == 1 else None
    slabs: dict[int, list[tuple[tuple[int, ...], _Shard]]] = {}
    for offsets, shard in shards:
        slabs.setdefault(offsets[dim], []).append((offsets, shard))
    pieces, end = [], 0
    for start, slab in sorted(slabs.items()):
        piece = _join(slab, dim + 1, num_dims)
        if piece is None or start != end:
            return None
        pieces.append(piece)
        end += piece.shape[dim]
    return pieces[0] if len(pieces) == 1 else Concatenated(pieces, dim) if pieces else None


class _Shard(LazyTensor):
    """The tensor in a span of a file, which is opened when it is first read."""

    def __init__(self, span: FileSpan, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._span = span
        self._opened: FileTensor | None = None

    def read(self, block: Block) -> Tensor:
        """A new tensor.

        Raises:
            CheckpointError: the bytes hold something else.
        """
        if self._opened is None:
            self._opened = self._open()
        return self._opened.read(block)

    def _open(self) -> FileTensor:
        path = self._span.file.path
        content = TorchFile(path, self._span).content
        if not isinstance(content, FileTensor) or _squeezed(content.shape) != _squeezed(self.shape):
            raise CheckpointError(
                f"{path}: holds something else than a tensor of {list(self.shape)} where one is wanted"
            )
        strides = tuple(step for step, size in zip(content.stride, content.shape, strict=True) if size != 1)
        if strides != contiguous_strides(_squeezed(self.shape)) or content.dtype != self.dtype:
            raise CheckpointError(f"{path}: a tensor of {list(self.shape)} does not lie there as {METADATA_FILE} says")
        return FileTensor(content.storage, content.offset, self.shape, contiguous_strides(self.shape))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes other than 1: a shard may be stored without the dimension of its layer."""
    return tuple(size for size in shape if size != 1)
