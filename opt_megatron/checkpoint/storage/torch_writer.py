"""Writing torch.save's file format before its tensors exist: the skeleton first, the data where it belongs.

`create_torch_file` lays out the archive that torch.save would write (torch/serialization.py), with a hole for every
tensor, and says at which byte each hole begins. Whoever has the data writes it there, in any order.
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

_ALIGNMENT = 64  # of every record's data, so that it can be mapped and viewed
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_LIMIT_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class TensorPlaceholder:
    """Stands in the content for a tensor that is written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def create_torch_file(path: Path, content: Any) -> dict[int, int]:
    """Write a file that torch.load reads as `content`, its holes as tensors of undefined values.

    Data that an earlier call's holes were filled with stays: the same content gives the same layout.

    Returns:
        id(hole) -> the byte at which its data begins.
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
        offsets = {id(h): archive.add_hole(f"{name}/data/{key}", h.num_bytes) for key, h in enumerate(pickler.holes)}
        archive.add(f"{name}/version", b"3\n")
        archive.close()
    return offsets


class _Storage:
    def __init__(self, key: int, hole: TensorPlaceholder) -> None:
        self.persistent_id = ("storage", _STORAGES[hole.dtype], str(key), "cpu", torch.Size(hole.shape).numel())


class _Pickler(pickle.Pickler):
    """Protocol 2, as torch.save writes, with holes pickled as tensors of storages of their own."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.holes: list[TensorPlaceholder] = []

    def reducer_override(self, obj: Any) -> Any:
        """A hole as torch pickles a contiguous tensor."""
        if not isinstance(obj, TensorPlaceholder):
            return NotImplemented
        strides, step = [], 1
        for size in reversed(obj.shape):
            strides.insert(0, step)
            step *= size
        self.holes.append(obj)
        storage = _Storage(len(self.holes) - 1, obj)
        arguments = (storage, 0, tuple(obj.shape), tuple(strides), False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, obj: Any) -> Any:
        """A storage by its record."""
        return obj.persistent_id if isinstance(obj, _Storage) else None


class _Archive:
    """A zip archive (APPNOTE.TXT 6.3) of stored records, with 64-bit sizes where they are needed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes) -> None:
        """A record whose data is known."""
        self._header(name, len(data), zlib.crc32(data))
        self._file.write(data)

    def add_hole(self, name: str, size: int) -> int:
        """A record whose data comes later; returns where. Its checksum stays 0, which torch never compares."""
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
        """Write the directory of records at the end."""
        start, count = self._file.tell(), len(self._directory)
        for entry in self._directory:
            self._file.write(entry)
        end = self._file.tell()
        self._file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - start, start))
        self._file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        small = (min(count, 0xFFFF), min(count, 0xFFFF), min(end - start, _LIMIT_32), min(start, _LIMIT_32))
        self._file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *small, 0))
        self._file.truncate()
