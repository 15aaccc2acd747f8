"""From JSON lines to Megatron's indexed format, as fast as the disk and the tokenizer allow.

    lines -> chunks of about a mebibyte -> workers: JSON, ids -> one writer, in the order of the lines

A document is `text.rstrip()`, and with `append_eod` a `</s>` after it; there is no BOS. What is written does not
depend on the number of workers, and memory not on the size of the files (but for the index: a few bytes a document).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from ..errors import UserError
from ..files import cannot_write, created_directory, file_lock, fsync_path, partial_path
from ..tokenizer import OPTTokenizer

_CHUNK_BYTES = 2**20
_CHUNKS_A_WORKER = 3  # in flight: one in work, one waiting, one to be written
_REPORTED_LINES = 5


# ---- JSON lines ----


class Chunk(NamedTuple):
    """Whole lines of one file."""

    path: str
    first_line: int  # counted from 1
    lines: list[bytes]


class BadLine(NamedTuple):
    """A line that gives no document."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class BadLines:
    """How many lines were skipped, and the first few of them."""

    count: int = 0
    first: list[BadLine] = field(default_factory=list)

    def add(self, lines: Sequence[BadLine], *, strict: bool = False) -> None:
        """Count them.

        Raises:
            UserError: there is one, and `strict` is set.
        """
        if strict and lines:
            raise UserError(f"{lines[0]} (with --strict no line may be bad)")
        self.count += len(lines)
        self.first += lines[: _REPORTED_LINES - len(self.first)]

    def report(self) -> list[str]:
        """Lines for the user; none where nothing was skipped."""
        if not self.count:
            return []
        more = f", the first {len(self.first)}:" if self.count > len(self.first) else ":"
        return [f"skipped {self.count} bad line{'s' if self.count > 1 else ''}{more}", *map(str, self.first)]


def check_inputs(paths: Sequence[str]) -> None:
    """Raise UserError unless each is a file that can be read."""
    if not paths:
        raise UserError("no input file was given")
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{path}: is a directory; give the files in it")
        try:
            with open(path, "rb"):
                pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{path}: cannot be read: {reason}") from None


def read_chunks(paths: Sequence[str], progress: Callable[[int], Any] = lambda _: None) -> Iterator[Chunk]:
    """The lines of the files, one file after the other; `.gz` files are unpacked on the way.

    Args:
        progress: is told how many more bytes of the files have been read.

    Raises:
        UserError: a file is not what its name says, or cut short.
    """
    for path in paths:
        with open(path, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
            line, position = 1, 0
            while lines := _read_lines(path, file):
                if line == 1:
                    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # Windows' byte order mark
                yield Chunk(path, line, lines)
                line += len(lines)
                progress(raw.tell() - position)
                position = raw.tell()


def _read_lines(path: str, file: Any) -> list[bytes]:
    try:
        return file.readlines(_CHUNK_BYTES)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None


def parse_line(line: bytes) -> dict[str, Any]:
    """The object that the line holds.

    Raises:
        ValueError: it holds none; the message says why.
    """
    line = line.strip()
    if not line:
        raise ValueError("is empty")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise ValueError(f"is not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("is not an object, {...}")
    return value


def text_of(value: dict[str, Any], key: str) -> str:
    """The text under `key`, without white space at its end.

    Raises:
        ValueError: there is none; the message says why.
    """
    text = string_of(value, key).rstrip()
    if not text:
        raise ValueError(f"{key!r} is empty")
    return text


def string_of(value: dict[str, Any], key: str) -> str:
    """What stands under `key`.

    Raises:
        ValueError: nothing does, or no string that could be encoded; the message says why.
    """
    if key not in value:
        raise ValueError(f"has no {key!r}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{key!r} has half a surrogate pair, which is no text")
    return text


def read_texts(paths: Sequence[str], key: str, bad: BadLines, *, strict: bool = False) -> Iterator[str]:
    """The texts of the files' good lines."""
    for chunk in read_chunks(paths):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                yield text_of(parse_line(line), key)
            except ValueError as error:
                bad.add([BadLine(chunk.path, number, str(error))], strict=strict)


# ---- text to ids ----


class FastEncoder:
    """`OPTTokenizer.encode` without BOS, several times as fast on ordinary text.

    Byte-level BPE never merges across the pieces that GPT-2's pattern cuts a text into, and most pieces of a
    text have been seen before: their ids are looked up. The pattern is GPT-2's (openai/gpt-2, encoder.py), as in
    the tokenizers library. `regex` and that library agree on the classes of all characters of the common blocks
    (which a test compares one by one); a text with any other goes through the library whole, because a
    character that one of them does not know yet would be classed differently.
    """

    _PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    # Latin, Greek, Cyrillic with their extensions; punctuation, currencies, symbols; kana, ideographs, Hangul,
    # full width; emoji.
    COMMON = (
        "\x00-\u052f\u1e00-\u206f\u20a0-\u20bf\u2100-\u214f\u2190-\u22ff\u2500-\u25ff"
        "\u3000-\u30ff\u4e00-\u9fef\uac00-\ud7a3\uff00-\uffef\U0001f300-\U0001f64f"
    )
    _RARE = re.compile(f"[^{COMMON}]")

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache = _PieceCache(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        if not text.isascii() and self._RARE.search(text):
            return self._tokenizer.encode(text, add_bos=False)
        return list(chain.from_iterable(map(self._cache.__getitem__, self._PIECES.findall(text))))


class _PieceCache(dict):
    """Piece -> ids; emptied when it is full, so that its memory is bounded."""

    _MAX_ENTRIES = 2**18
    _MAX_CHARACTERS = 32

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(piece, add_bos=False))
        if len(piece) <= self._MAX_CHARACTERS:
            if len(self) >= self._MAX_ENTRIES:
                self.clear()
            self[piece] = ids
        return ids


class Encoded(NamedTuple):
    """The documents of a chunk."""

    tokens: np.ndarray  # [sum of lengths], the data set's dtype
    lengths: list[int]
    text_bytes: int  # UTF-8 bytes of the texts
    bad: list[BadLine]


class ChunkEncoder:
    """Chunks of lines to documents of ids."""

    def __init__(self, tokenizer: OPTTokenizer, key: str, dtype: str, append_eod: bool) -> None:
        self._encoder = FastEncoder(tokenizer)
        self._end = [tokenizer.eos_token_id] if append_eod else []
        self._key, self._dtype = key, dtype

    def encode(self, chunk: Chunk) -> Encoded:
        """Documents in the order of the lines; lines that hold none are told of."""
        tokens: list[np.ndarray] = []
        bad: list[BadLine] = []
        text_bytes = 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                text = text_of(parse_line(line), self._key)
            except ValueError as error:
                bad.append(BadLine(chunk.path, number, str(error)))
                continue
            tokens.append(np.array(self._encoder.encode(text) + self._end, self._dtype))
            text_bytes += len(text) if text.isascii() else len(text.encode())
        joined = np.concatenate(tokens) if tokens else np.zeros(0, self._dtype)
        return Encoded(joined, [len(document) for document in tokens], text_bytes, bad)


# ---- workers ----

_encoder: ChunkEncoder  # of a worker process


def encode_in_order(
    chunks: Iterator[Chunk], tokenizer_directory: Path, key: str, dtype: str, append_eod: bool, workers: int
) -> Iterator[Encoded]:
    """Each chunk encoded, in order; by this process for one worker, else by as many processes.

    Raises:
        UserError: a worker was ended from outside, as for want of memory.
    """
    arguments = (tokenizer_directory, key, dtype, append_eod)
    if workers == 1:
        encoder = _make_encoder(*arguments)
        yield from map(encoder.encode, chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    try:
        waiting: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            with _interrupts_held():  # the first submission starts the workers, and they inherit it
                waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= _CHUNKS_A_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was ended from outside (out of memory?): try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _make_encoder(tokenizer_directory: Path, key: str, dtype: str, append_eod: bool) -> ChunkEncoder:
    return ChunkEncoder(OPTTokenizer.from_directory(tokenizer_directory), key, dtype, append_eod)


def _start_worker(*arguments: Any) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = _make_encoder(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _encoder.encode(chunk)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Inside the block Ctrl-C waits; processes that are started there never see it and leave it to their parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- the whole ----


@dataclass
class Summary:
    """What was written."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    dtype: str = ""
    seconds: float = 0.0
    bad: BadLines = field(default_factory=BadLines)


def preprocess(
    inputs: Sequence[str],
    tokenizer_directory: Path,
    output_prefix: str,
    *,
    json_key: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    strict: bool = False,
    force: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
) -> Summary:
    """Write `{output_prefix}_{json_key}_document.bin` and `.idx`, whole or not at all.

    Args:
        inputs: JSON lines, each an object with a text under `json_key`; also `.gz`.
        strict: a bad line is an error, and not skipped.
        progress: is told how many more bytes of the inputs have been read.

    Raises:
        UserError: files that cannot be read, no document in them, or output that exists without `force`.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}, but must be at least 1")
    if not json_key or "/" in json_key:
        raise UserError(f"--json-key {json_key!r} cannot be part of a file name")
    check_inputs(inputs)
    vocabulary = len(OPTTokenizer.from_directory(tokenizer_directory))
    summary = Summary(f"{output_prefix}_{json_key}_document")
    with _IndexedOutput(summary.prefix, vocabulary, force=force) as output:
        started = time.monotonic()  # after megatron-core's import
        summary.dtype = output.dtype
        chunks = read_chunks(inputs, progress)
        with contextlib.closing(
            encode_in_order(chunks, tokenizer_directory, json_key, output.dtype, append_eod, workers)
        ) as encoded:
            for part in encoded:
                summary.bad.add(part.bad, strict=strict)
                output.add(part)
                summary.documents += len(part.lengths)
                summary.tokens += len(part.tokens)
                summary.text_bytes += part.text_bytes
        if not summary.documents:
            raise UserError("; ".join(["the input holds no documents", *summary.bad.report()]))
        output.publish()
        summary.seconds = time.monotonic() - started
    return summary


class _IndexedOutput:
    """A .bin/.idx pair that is written by megatron-core's builder under other names and renamed at the end."""

    def __init__(self, prefix: str, vocabulary: int, *, force: bool) -> None:
        from ..parallel.core_compat import import_core

        self._targets = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        for target in self._targets:
            if target.exists() and not force:
                raise UserError(f"{target}: exists already; --force replaces it")
        import_core()
        from megatron.core.datasets.indexed_dataset import DType

        self.dtype: str = DType.optimal_dtype(vocabulary).__name__
        self._partial = [partial_path(target) for target in self._targets]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _IndexedOutput:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        busy = f"{self._targets[0]}: another process is writing it just now"
        with contextlib.ExitStack() as stack:
            stack.enter_context(created_directory(self._partial[0].parent))
            stack.enter_context(file_lock(self._partial[0], busy))
            self._builder = IndexedDatasetBuilder(str(self._partial[0]), np.dtype(self.dtype).type)
            self._stack = stack.pop_all()
        return self

    def add(self, part: Encoded) -> None:
        """Append the documents of a chunk."""
        ends = np.cumsum(part.lengths, dtype=np.int64)
        for end, length in zip(ends, part.lengths, strict=True):
            self._builder.add_document(part.tokens[end - length : end], [length])

    def publish(self) -> None:
        """Write the index and give both files their names, the index last."""
        self._builder.finalize(str(self._partial[1]))
        for partial in self._partial:
            fsync_path(partial)
        self._targets[1].unlink(missing_ok=True)
        for partial, target in zip(self._partial, self._targets, strict=True):
            partial.rename(target)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with self._stack:
            with contextlib.suppress(OSError):  # the disk is full, which `error` says; the file is removed
                self._builder.data_file.close()
            for partial in self._partial:
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(self._targets[0], error) from error
