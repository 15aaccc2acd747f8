"""Writes torch.save's file format before the tensors' data is known.

`create_torch_file` writes the archive that torch.save would write (torch/serialization.py), with a hole for the
data of every tensor, and returns where each hole begins. The data is written there later, in any order.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .blocks import contiguous_strides

_ALIGNMENT = 64  # of every record's data, so that it can be viewed where it is read
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_LIMIT_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class TensorPlaceholder:
    """A placeholder in the saved object for a tensor whose data is written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def create_torch_file(path: Path, content: Any) -> dict[int, int]:
    """Write a file that torch.load reads as `content`, with a tensor of undefined values for each placeholder.

    If the file was created before with the same content, the data that was written into it stays.

    Returns:
        id(placeholder) -> the byte at which its data begins.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    name = path.stem
    path.touch()
    with path.open("r+b") as file:
        archive = _Archive(file)
        archive.add(f"{name}/data.pkl", buffer.getvalue())
        archive.add(f"{name}/byteorder", b"little")
        offsets = {
            id(placeholder): archive.add_hole(f"{name}/data/{key}", placeholder.num_bytes)
            for key, placeholder in enumerate(pickler.placeholders)
        }
        archive.add(f"{name}/version", b"3\n")
        archive.close()
    return offsets


class _PlaceholderStorage:
    def __init__(self, key: int, tensor: TensorPlaceholder) -> None:
        self.persistent_id = ("storage", _STORAGES[tensor.dtype], str(key), "cpu", torch.Size(tensor.shape).numel())


class _Pickler(pickle.Pickler):
    """Protocol 2, as torch.save writes, with each placeholder pickled as a tensor that has a storage to itself."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.placeholders: list[TensorPlaceholder] = []

    def reducer_override(self, obj: Any) -> Any:
        """A placeholder as torch pickles a contiguous tensor; the default for everything else."""
        if not isinstance(obj, TensorPlaceholder):
            return NotImplemented
        self.placeholders.append(obj)
        storage = _PlaceholderStorage(len(self.placeholders) - 1, obj)
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        arguments = (storage, 0, tuple(obj.shape), contiguous_strides(obj.shape), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, obj: Any) -> Any:
        """The id of a placeholder's storage, which names its record; None for everything else."""
        return obj.persistent_id if isinstance(obj, _PlaceholderStorage) else None


class _Archive:
    """A zip archive (APPNOTE.TXT 6.3) of stored records, with 64-bit sizes where they are needed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes) -> None:
        """Write a record and its data."""
        self._header(name, len(data), zlib.crc32(data))
        self._file.write(data)

    def add_hole(self, name: str, size: int) -> int:
        """Write a record without its data; returns the data's offset. The checksum is 0: torch does not compare it."""
        start = self._header(name, size, 0)
        self._file.seek(start + size)
        return start

    def _header(self, name: str, size: int, checksum: int) -> int:
        offset, encoded = self._file.tell(), name.encode()
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LIMIT_32 else b""
        before_padding = offset + 30 + len(encoded) + len(large)
        gap = -(before_padding + 4) % _ALIGNMENT
        extra = large + struct.pack("<2sH", b"FB", gap) + b"Z" * gap  # the field with which torch aligns
        sizes = (_LIMIT_32, _LIMIT_32) if large else (size, size)
        fields = (45 if large else 20, 0, 0, 0, 0x21, checksum, *sizes)
        self._file.write(
            struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields, len(encoded), len(extra)) + encoded + extra
        )
        self._remember(encoded, size, checksum, offset)
        return self._file.tell()

    def _remember(self, name: bytes, size: int, checksum: int, offset: int) -> None:
        values = [value for value in (size, size) if value >= _LIMIT_32] + ([offset] if offset >= _LIMIT_32 else [])
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        sizes = [min(value, _LIMIT_32) for value in (size, size)]
        fields = (45, 45 if values else 20, 0, 0, 0, 0x21, checksum, *sizes, len(name), len(extra), 0, 0, 0, 0)
        fixed = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *fields, min(offset, _LIMIT_32))
        self._directory.append(fixed + name + extra)

    def close(self) -> None:
        """Write the central directory, which ends the archive."""
        start, count = self._file.tell(), len(self._directory)
        for entry in self._directory:
            self._file.write(entry)
        end = self._file.tell()
        self._file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - start, start))
        self._file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        small = (min(count, 0xFFFF), min(count, 0xFFFF), min(end - start, _LIMIT_32), min(start, _LIMIT_32))
        self._file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *small, 0))
        self._file.truncate()
