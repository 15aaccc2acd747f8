"""`.metadata` of torch.distributed.checkpoint (DCP): where every shard of every tensor is.

A pickle of torch's dataclasses (torch/distributed/checkpoint/metadata.py and filesystem.py), which is read as records:

    Metadata               state_dict_metadata  {name: TensorStorageMetadata, or BytesStorageMetadata of an object}
                           storage_data         {MetadataIndex: _StorageInfo}
    TensorStorageMetadata  properties (the dtype is the first of them), size, chunks [ChunkStorageMetadata]
    ChunkStorageMetadata   offsets, sizes
    MetadataIndex          fqn (the name), offset
    _StorageInfo           relative_path, offset, length, and transform_descriptors if the bytes are compressed

Bytes `offset` to `offset + length` of a file are a file of torch.save: with one tensor, the chunk, or with an object,
whose index has no offset.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...config import DTYPES
from ...errors import CheckpointError, shorten
from ...files import read_bounded
from ..storage.safe_unpickler import Record, unpickle
from ..storage.torch_reader import MAX_PICKLE_BYTES

METADATA_FILE = ".metadata"
_TORCH, _CORE = "torch.distributed.checkpoint", "megatron.core.dist_checkpointing.strategies.torch"
_RECORDS = {
    (f"{_TORCH}.metadata", "Metadata"): "Metadata",
    (_CORE, "MCoreMetadata"): "Metadata",  # a subclass in some versions of Megatron-core
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): "TensorStorageMetadata",
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): "ChunkStorageMetadata",
    (f"{_TORCH}.metadata", "TensorProperties"): "TensorProperties",
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): "TensorProperties",  # before torch 2.3
    (f"{_TORCH}.metadata", "MetadataIndex"): "MetadataIndex",
    (f"{_TORCH}.filesystem", "_StorageInfo"): "_StorageInfo",
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{name: partial(Record, kind) for name, kind in _RECORDS.items()},
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    ("torch", "Size"): tuple,
}
_LONGEST_NAME = 300
_BYTES_PER_BYTE = 80  # by the interpreter's count, which is an upper bound: small objects take 45 to 55
_Offsets = tuple[int, ...] | None  # of a chunk; None: of an object
_StorageInfos = dict[tuple[str, _Offsets], dict[str, Any]]  # (name, offsets) -> the attributes of a _StorageInfo


@dataclass(frozen=True)
class ByteRange:
    """Bytes of a file of the directory."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: ByteRange


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor, and the chunks that it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


@dataclass(frozen=True)
class Contents:
    """What a directory holds, by name: the tensors (without the optimizer's), and where the wanted objects are."""

    tensors: dict[str, TensorEntry]
    objects: dict[str, ByteRange]


def read_metadata(directory: Path, objects: Collection[str] = ()) -> Contents:
    """What `.metadata` says of the tensors, and of the objects of these names.

    Raises:
        CheckpointError: `.metadata` is damaged, or chunks are compressed.
    """
    path = directory / METADATA_FILE
    try:
        content = read_bounded(path, MAX_PICKLE_BYTES)
        metadata = _state(unpickle(content, _KNOWN, _no_storage, bytes_per_byte=_BYTES_PER_BYTE), "Metadata")
        wanted = {
            name: _state(value, "TensorStorageMetadata")
            for name, value in metadata["state_dict_metadata"].items()
            if _is_model_tensor(name, value)
        }
        infos = _storage_infos(metadata["storage_data"], wanted.keys() | set(objects))
        tensors = {name: _entry(name, state, infos) for name, state in wanted.items()}
        return Contents(tensors, {name: _byte_range(name, info) for (name, at), info in infos.items() if at is None})
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged or hostile pickle can make the interpreter raise anything
        raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:160]}") from None


def _is_model_tensor(name: Any, value: Any) -> bool:
    if type(name) is not str or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError("a tensor has a name that is too long or cannot be printed")
    is_tensor = type(value) is Record and value.kind == "TensorStorageMetadata"
    return is_tensor and not name.startswith("optimizer.") and "_extra_state" not in name


def _storage_infos(storage_data: dict[Any, Any], wanted: Container[str]) -> _StorageInfos:
    infos: _StorageInfos = {}
    for key, value in storage_data.items():
        index = _state(key, "MetadataIndex")
        name, offsets = index["fqn"], index.get("offset")
        if type(name) is str and name in wanted:
            infos[name, None if offsets is None else _numbers(offsets)] = _state(value, "_StorageInfo")
    return infos


def _entry(name: str, state: dict[str, Any], infos: _StorageInfos) -> TensorEntry:
    dtype = state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name} is of a dtype that OPT is not stored in; {', '.join(DTYPES)} are read")
    return TensorEntry(_numbers(state["size"]), dtype, [_chunk(name, dtype, value, infos) for value in state["chunks"]])


def _chunk(name: str, dtype: torch.dtype, value: Any, infos: _StorageInfos) -> Chunk:
    state = _state(value, "ChunkStorageMetadata")
    offsets, sizes = _numbers(state["offsets"]), _numbers(state["sizes"])
    if (name, offsets) not in infos:
        raise ValueError(f"it does not say where {name} is from {list(offsets)} on")
    stored = _byte_range(name, infos[name, offsets])
    if math.prod(sizes) * dtype.itemsize > stored.length:
        raise ValueError(f"{name} has shards of {list(sizes)} in {stored.length:,} bytes")
    return Chunk(offsets, sizes, stored)


def _byte_range(name: str, info: dict[str, Any]) -> ByteRange:
    transforms, file = info.get("transform_descriptors"), info["relative_path"]
    if transforms:
        names = shorten([word for word in transforms if type(word) is str])
        raise CheckpointError(f"{name} is stored with the transform {names}, which is not read here: save it without")
    if type(file) is not str or not file.isprintable() or Path(file).name != file:
        raise ValueError(f"{name} is in a file that is not of the directory, {file[:40]!r}")
    start, length = _numbers((info["offset"], info["length"]))
    return ByteRange(file, start, length)


def _state(value: Any, kind: str) -> dict[str, Any]:
    """The attributes of a record of this kind."""
    if type(value) is not Record or value.kind != kind or type(value.state) is not dict:
        raise ValueError(f"something else where a {kind} is wanted")
    return value.state


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or any(type(number) is not int or number < 0 for number in value):
        raise ValueError("something else where a size is wanted")
    return value


def _no_storage(identifier: Any) -> Any:
    raise ValueError("a storage, which belongs into another file")
