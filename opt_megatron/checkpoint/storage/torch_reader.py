"""Reads files that torch.save wrote, without running or importing anything that they name.

The file is a zip archive of stored (not compressed) records: `data.pkl`, and one record for each storage.
`safe_unpickler.py` interprets the pickle; its tensors know where in the file they are, and are read when they are
needed. (The format: torch/serialization.py and caffe2/serialize/inline_container.h.)
"""

from __future__ import annotations

import argparse
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, shorten
from .lazy_tensor import LazyTensor, without_module_prefix
from .safe_unpickler import latin1_bytes, ordered_dict, unpickle
from .tensor_file import FileTensor, Storage, TensorFile

MAX_PICKLE_BYTES = 64 * 2**20  # the skeleton of a 175B checkpoint is under one MiB
# torch.serialization.MAGIC_NUMBER, pickled: so begins a file of torch before 1.6, which is no archive.
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class FileSpan:
    """A span of a file that is itself a file of torch.save; torch.distributed.checkpoint's files consist of them."""

    file: TensorFile
    start: int
    length: int


class _SpanFile(io.RawIOBase):
    """A span of a file as a file object, of which no more can be read at once than a pickle may have."""

    def __init__(self, span: FileSpan) -> None:
        self._span, self._at = span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._span.length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._span.length - self._at)
        count = left if size < 0 else min(size, left)
        if count > MAX_PICKLE_BYTES:  # zipfile reads the archive's directory as a whole
            raise ValueError(f"a record or a directory of {count:,} bytes; {MAX_PICKLE_BYTES:,} is the limit")
        buffer = bytearray(count)
        self._span.file.fill(memoryview(buffer), self._span.start + self._at)
        self._at += count
        return bytes(buffer)


class TorchFile:
    """An opened file: the object that was saved, with a `FileTensor` for every tensor.

    Args:
        span: what to open of the file; by default all of it.

    Attributes:
        path: the file.
        content: the object that was saved.

    Raises:
        CheckpointError: the file is damaged, or of the format before torch 1.6.
    """

    def __init__(self, path: Path, span: FileSpan | None = None) -> None:
        self.path = path
        self._file = TensorFile(path) if span is None else span.file
        try:
            with _SpanFile(span or FileSpan(self._file, 0, self._file.size)) as source:
                if not zipfile.is_zipfile(source):
                    raise _not_an_archive(path, self._file)
                with zipfile.ZipFile(source) as archive:
                    records = _Records(archive, self._file, 0 if span is None else span.start)
                    self.content = unpickle(records.pickle(), _KNOWN, records.persistent_load)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged or hostile pickle can make the interpreter raise anything
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:160]}") from None

    def model(self, whose: str, key: str = "model") -> dict[str, LazyTensor]:
        """The tensors under `key`; metaseq and Megatron-LM store theirs under "model".

        Raises:
            CheckpointError: there is no such dictionary, so the file is not one of `whose`.
        """
        model = self.content.get(key) if isinstance(self.content, dict) else None
        if not isinstance(model, dict):
            raise CheckpointError(f"{self._file.path}: has no '{key}' dictionary, so it is not a {whose} checkpoint")
        return self.tensors(model)

    def tensors(self, values: dict[Any, Any]) -> dict[str, LazyTensor]:
        """The tensors in one of the content's dictionaries by name; other values are left out."""
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        found = {name: value for name, value in named.items() if isinstance(value, FileTensor)}
        for name, tensor in found.items():
            if tensor.num_elements > tensor.storage.num_elements:  # as torch.Tensor.expand makes them
                declared = f"{list(tensor.shape)}, {tensor.num_elements:,} numbers"
                raise CheckpointError(
                    f"{self.path}: {shorten([name])} is {declared}, and the {tensor.storage.num_elements:,} that are "
                    "stored are repeated; save the whole tensor, with .contiguous()"
                )
        return without_module_prefix(dict(found))


class StorageRecord(Storage):
    """The record of a torch storage in the archive.

    Where its data begins follows from the record's header, which is read only when the data is: a raw
    checkpoint of 175B has 100,000 records.
    """

    def __init__(self, file: TensorFile, header_offset: int, num_elements: int, dtype: torch.dtype) -> None:
        super().__init__(file, -1, num_elements, dtype)
        self._header_offset = header_offset

    def byte(self, element: int) -> int:
        """Where an element begins in the file."""
        if self.start < 0:
            header = self.file.tensor(self._header_offset, 30, torch.uint8).numpy().tobytes()
            name_size, extra_size = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            self.start = self._header_offset + 30 + name_size + extra_size
        return super().byte(element)


class _Records:
    """The archive's records by name; none of them is ever extracted to the disk."""

    def __init__(self, archive: zipfile.ZipFile, file: TensorFile, start: int) -> None:
        self._archive = archive
        self._file = file
        self._start = start  # of the archive in the file
        self._storages: dict[tuple[str, torch.dtype], StorageRecord] = {}
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{file.path}: holds {len(pickles)} data.pkl records instead of one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._entries.get(f"{self._prefix}byteorder") and self._bytes("byteorder", 16) != b"little":
            raise CheckpointError(f"{file.path}: was saved on a big-endian machine")

    def pickle(self) -> bytes:
        """The bytes of `data.pkl`, which holds everything but the tensors' elements."""
        return self._bytes("data.pkl", MAX_PICKLE_BYTES)

    def persistent_load(self, pid: Any) -> StorageRecord:
        """The storage that the pickle refers to as ("storage", type, record, location, elements)."""
        kind, dtype, key, _, num_elements = pid
        known = type(kind) is type(key) is str and kind == "storage" and isinstance(dtype, torch.dtype)
        if not known or type(num_elements) is not int:
            raise ValueError("a storage of an unknown kind")
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._storage(key, dtype, num_elements)
        return self._storages[key, dtype]

    def _storage(self, key: str, dtype: torch.dtype, num_elements: int) -> StorageRecord:
        """A storage's record, checked to be inside the file and large enough."""
        entry = self._entry(f"data/{key}")
        size = num_elements * dtype.itemsize
        header = self._start + entry.header_offset
        if num_elements < 0 or size > entry.file_size or header + 30 + size > self._file.size:
            raise CheckpointError(
                f"{self._file.path}: is damaged or incomplete: storage {key} of {size:,} bytes is not all there"
            )
        return StorageRecord(self._file, header, num_elements, dtype)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise CheckpointError(f"{self._file.path}: has no record {name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self._file.path}: record {name} is compressed, which torch.save never does")
        return entry

    def _bytes(self, name: str, limit: int) -> bytes:
        entry = self._entry(name)
        if entry.file_size > limit:
            size = f"{entry.file_size:,} bytes; {limit:,} is the limit"
            raise CheckpointError(f"{self._file.path}: record {name} has {size}")
        return self._archive.read(entry)


def _not_an_archive(path: Path, file: TensorFile) -> CheckpointError:
    if file.start(len(_OLD_FORMAT)) == _OLD_FORMAT:
        return CheckpointError(
            f"{path}: has torch's format from before 1.6, which is not read here; save it again with a newer torch: "
            "torch.save(torch.load(FILE, map_location='cpu'), FILE)"
        )
    return CheckpointError(f"{path}: is truncated, or not a file that torch.save wrote")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> FileTensor:
    """torch._utils._rebuild_tensor_v2, with its bounds checked."""
    if type(storage) is not StorageRecord or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without a storage, a size or a stride")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor whose offset, size and stride are not numbers that belong together")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.num_elements:
        raise ValueError(f"a tensor that reaches to element {last} of a storage of {storage.num_elements}")
    return FileTensor(storage, offset, size, stride)


def _rebuild_parameter(data: Any, *unused: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor itself."""
    return data


def _size(numbers: Any = ()) -> tuple:
    """torch.Size as a plain tuple."""
    return tuple(numbers)


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): ordered_dict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("_codecs", "encode"): latin1_bytes,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}
