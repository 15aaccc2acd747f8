"""Reading Megatron's indexed token files (.bin and .idx), with the checks that megatron-core does not make."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document borders
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # core's DType
_INDEX_BLOCK = 2**20  # sequences checked at once
_SCAN_BLOCK = 2**22  # bytes of token ids read at once
_SCAN_BLOCKS = 64  # at most this many, evenly spread over a larger file


def exists(prefix: str) -> bool:
    """Whether one of the two files of this prefix exists."""
    return Path(f"{prefix}.bin").is_file() or Path(f"{prefix}.idx").is_file()


@dataclass(frozen=True)
class IndexedFile:
    """A .bin/.idx pair whose index has been checked.

    The format is megatron-core's (datasets/indexed_dataset.py, _IndexWriter): the header, int32 lengths of the
    sequences in tokens, their int64 byte offsets, int64 borders of the documents.
    """

    prefix: str
    dtype: np.dtype
    lengths: np.ndarray  # int32 [sequences]

    @property
    def bin_path(self) -> Path:
        """The file of the token ids."""
        return Path(f"{self.prefix}.bin")

    def num_tokens(self, begin: int, end: int) -> int:
        """Number of tokens in the sequences [begin, end)."""
        return int(self.lengths[begin:end].sum(dtype=np.int64))


def open_indexed(prefix: str) -> IndexedFile:
    """Open a pair of files, and check that the index is consistent and fits the size of the .bin.

    Raises:
        UserError: a file is missing, damaged, or not of this format.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file{_suggestion(prefix)}")
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{idx_path}: is no index of Megatron's format (it does not begin with MMIDIDX)")
    _, number, code, sequences, borders = _HEADER.unpack(header)
    if number != 1 or code not in _DTYPES:
        raise UserError(f"{idx_path}: version {number} with dtype code {code} is not known; only version 1 of integers")
    size, expected = idx_path.stat().st_size, _HEADER.size + 12 * sequences + 8 * borders
    if size not in (expected, expected + sequences):  # the latter has a mode byte for each, not used here
        raise UserError(
            f"{idx_path}: {sequences} sequences and {borders} borders take {expected} bytes, but it has {size}: "
            "it is damaged, preprocess it again"
        )
    if not sequences:
        raise UserError(f"{idx_path}: holds no documents")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.memmap(idx_path, np.int32, "r", _HEADER.size, (sequences,))
    pointers = np.memmap(idx_path, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    _check_layout(idx_path, bin_path, lengths, pointers, dtype.itemsize)
    edges = np.memmap(idx_path, np.int64, "r", _HEADER.size + 12 * sequences, (borders,)) if borders else [0]
    if edges[-1] != sequences:  # core asserts it
        raise UserError(f"{idx_path}: the last document does not end with the last sequence: it is damaged")
    return IndexedFile(prefix, dtype, lengths)


def _suggestion(prefix: str) -> str:
    for guess in (f"{prefix}_text_document", prefix.removesuffix(".bin").removesuffix(".idx")):
        if guess != prefix and exists(guess):
            return f"; did you mean {guess}?"
    return "; a data path is what preprocess wrote, without .bin and .idx"


def _check_layout(idx_path: Path, bin_path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    total = 0
    for begin in range(0, len(lengths), _INDEX_BLOCK):
        num_bytes = lengths[begin : begin + _INDEX_BLOCK].astype(np.int64) * itemsize
        offsets = total + np.cumsum(num_bytes) - num_bytes
        if (num_bytes < 0).any() or not np.array_equal(offsets, pointers[begin : begin + _INDEX_BLOCK]):
            raise UserError(
                f"{idx_path}: lengths and offsets contradict each other: it is damaged, preprocess it again"
            )
        total += int(num_bytes.sum())
    if bin_path.stat().st_size != total:
        raise UserError(
            f"{bin_path}: has {bin_path.stat().st_size} bytes, but its index says {total}: "
            "they do not belong together or one is cut short; preprocess it again"
        )


def check_tokens(file: IndexedFile, vocab_size: int) -> None:
    """Check that the token ids are in the vocabulary: all of them, or an evenly spread 256 MiB of a larger file.

    PretrainingDataset checks the rest, sample by sample.

    Raises:
        UserError: an id is not in the vocabulary.
    """
    limits = np.iinfo(file.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return
    size = file.bin_path.stat().st_size
    starts = range(0, size, _SCAN_BLOCK)
    if len(starts) > _SCAN_BLOCKS:
        starts = starts[:: -(-len(starts) // _SCAN_BLOCKS)]
    for start in starts:
        count = min(_SCAN_BLOCK, size - start) // file.dtype.itemsize
        tokens = np.fromfile(file.bin_path, file.dtype, count, offset=start)
        if tokens.max() >= vocab_size or tokens.min() < 0:
            worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise UserError(outside_vocabulary(str(file.bin_path), worst, vocab_size))


def outside_vocabulary(where: str, token: int, vocab_size: int) -> str:
    """The error message for a token id that the model does not have."""
    return (
        f"{where}: the token id {token} is not in the model's vocabulary of {vocab_size}: "
        "the data were made with another tokenizer"
    )
