"""Reading files that torch.save wrote, without running or importing anything that they name.

The file is a zip archive of stored (not compressed) records: `data.pkl`, and one record for each storage.
The pickle is interpreted here. Tensors become views of the mapped file; containers and
`argparse.Namespace` become themselves; any other class or function becomes an inert stub that swallows
whatever the pickle does with it. (The format: torch/serialization.py and caffe2/serialize/inline_container.h.)
"""

from __future__ import annotations

import argparse
import collections
import pickle
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .mapped import MappedFile
from .sources import Source

_MAX_PICKLE_BYTES = 256 * 2**20  # the skeleton of a 175B checkpoint is under one MiB
_DTYPES = {
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


class Inert:
    """Stands for an object of a class that is not known here. Whatever is done to it does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Any arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Calling it gives another."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Forget the state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget the item."""

    def append(self, item: Any) -> None:
        """Forget the item."""

    def extend(self, items: Any) -> None:
        """Forget the items."""

    def add(self, item: Any) -> None:
        """Forget the item."""


class MappedTensors:
    """What one file holds: its object, with tensors that are views of the file.

    Attributes:
        content: the object that was saved.

    Raises:
        CheckpointError: the file is damaged, or of the format before torch 1.6.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        try:
            if not zipfile.is_zipfile(path):
                raise CheckpointError(
                    f"{path}: is truncated, or not a file that torch.save wrote in the format of torch 1.6 or later"
                )
            with zipfile.ZipFile(path) as archive:
                self.content = _Unpickler(_Records(archive, self._file)).load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged or hostile pickle can make the interpreter raise anything
            raise CheckpointError(f"{path}: is damaged: {type(error).__name__}: {str(error)[:160]}") from None

    def source(self, tensor: Tensor) -> Source:
        """A source over one of the content's tensors."""
        return self._file.source(tensor)


class _Storage(NamedTuple):
    values: Tensor  # [elements]


class _Records:
    """The archive's records, found by name; none of them is ever extracted to the disk."""

    def __init__(self, archive: zipfile.ZipFile, file: MappedFile) -> None:
        self._archive = archive
        self._file = file
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{file.path}: holds {len(pickles)} data.pkl records instead of one")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._entries.get(f"{self._prefix}byteorder") and self._bytes("byteorder", 16) != b"little":
            raise CheckpointError(f"{file.path}: was saved on a big-endian machine")

    def pickle(self) -> bytes:
        """The skeleton."""
        return self._bytes("data.pkl", _MAX_PICKLE_BYTES)

    def storage(self, key: str, dtype: torch.dtype, num_elements: int) -> Tensor:
        """[num_elements] view of a storage's record."""
        entry = self._entry(f"data/{key}")
        if num_elements * dtype.itemsize > entry.file_size:
            raise CheckpointError(f"{self._file.path}: storage {key} has {entry.file_size:,} bytes, too few")
        # Where the data begins stands in the record's own header, whose name and extra fields vary.
        header = self._file.tensor(entry.header_offset, 30, torch.uint8).numpy().tobytes()
        name_size, extra_size = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return self._file.tensor(entry.header_offset + 30 + name_size + extra_size, num_elements, dtype)

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
            raise CheckpointError(
                f"{self._file.path}: record {name} has {entry.file_size:,} bytes; {limit:,} is the limit"
            )
        return self._archive.read(entry)


class _Unpickler(pickle._Unpickler):
    """The interpreter in Python, not the one in C: a hostile memo index costs it an entry, not gigabytes.

    Nothing that came from the pickle is hashed, compared or printed as a whole, except plain values: a
    tuple of tuples of tuples ... that share their parts takes no room, and for ever to walk through.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, records: _Records) -> None:
        super().__init__(BytesIO(records.pickle()), encoding="utf-8")
        self._records = records
        self._storages: dict[tuple[str, torch.dtype], _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A class by name, out of the few that are known; nothing is imported."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = _KNOWN.get((module, name))
        return known if known is not None else type("Inert", (Inert,), {"__module__": __name__})

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage that the pickle refers to: ("storage", type, record, location, elements)."""
        kind, dtype, key, _, num_elements = pid
        known = type(kind) is type(key) is str and kind == "storage" and isinstance(dtype, torch.dtype)
        if not known or type(num_elements) is not int:
            raise ValueError("a storage of an unknown kind")
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = _Storage(self._records.storage(key, dtype, num_elements))
        return self._storages[key, dtype]

    def get_extension(self, code: int) -> None:
        """Codes of the interpreter's own registry have no place in a checkpoint."""
        raise pickle.UnpicklingError(f"extension code {code}")

    # The opcodes that would set attributes of any object, or hash one.

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is argparse.Namespace and type(state) is dict:
            vars(target).update({key: value for key, value in state.items() if type(key) is str})

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_plain_key(key)] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_plain_key(key)] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({_plain_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _set_of_items(self) -> None:
        self.append({_plain_key(item) for item in self.pop_mark()})

    def _add_items(self) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(_plain_key(item))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.FROZENSET[0]] = _set_of_items
    dispatch[pickle.ADDITEMS[0]] = _add_items


def _plain_key(key: Any) -> Any:
    """The key itself if hashing it takes no walk through containers; else a stand-in."""
    return key if type(key) in (str, int, float, bool, bytes, type(None)) else Inert()


def _ordered_dict(items: Any = ()) -> collections.OrderedDict:
    """collections.OrderedDict, of pairs whose keys are plain."""
    return collections.OrderedDict((_plain_key(key), value) for key, value in items)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *unused: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2, on the mapped storage and with its bounds checked."""
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor without a storage, a size or a stride")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor whose offset, size and stride are not numbers that belong together")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage.values):
        raise ValueError(f"a tensor that reaches to element {last} of a storage of {len(storage.values)}")
    # as_strided counts from the start of the file's mapping, of which the storage is a part.
    return storage.values.as_strided(size, stride, storage.values.storage_offset() + offset)


def _rebuild_parameter(data: Any, *unused: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor itself."""
    return data


def _bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, which is how protocol 2 spells a bytes object."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes that are not spelt as latin1")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): _ordered_dict,
    ("argparse", "Namespace"): argparse.Namespace,
}
