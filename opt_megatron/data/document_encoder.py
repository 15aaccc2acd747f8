"""Chunks of JSON lines to documents of token ids, in this process or in worker processes, in the order of the lines."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..tokenizer import OPTTokenizer
from .fast_encoder import FastEncoder
from .jsonl import BadLine, Chunk, get_text, parse_object

_CHUNKS_PER_WORKER = 3  # in flight: one being encoded, one waiting, one to be written


class EncodedChunk(NamedTuple):
    """The documents of a chunk."""

    tokens: np.ndarray  # [sum of lengths], the dtype of the data set
    lengths: list[int]
    text_bytes: int  # UTF-8 bytes of the texts
    bad: list[BadLine]


class DocumentEncoder:
    """Parses and tokenizes the lines of a chunk.

    Args:
        key: the text's key in each JSON object.
        dtype: name of the NumPy dtype of the ids.
        append_eod: end each document with </s>.
    """

    def __init__(self, tokenizer: OPTTokenizer, key: str, dtype: str, append_eod: bool) -> None:
        self._encoder = FastEncoder(tokenizer)
        self._end = [tokenizer.eos_token_id] if append_eod else []
        self._key, self._dtype = key, dtype

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """The documents in the order of the lines, and the lines that hold none."""
        tokens: list[np.ndarray] = []
        bad: list[BadLine] = []
        text_bytes = 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                text = get_text(parse_object(line), self._key)
            except ValueError as error:
                bad.append(BadLine(chunk.path, number, str(error)))
                continue
            tokens.append(np.array(self._encoder.encode(text) + self._end, self._dtype))
            text_bytes += len(text) if text.isascii() else len(text.encode())
        joined = np.concatenate(tokens) if tokens else np.zeros(0, self._dtype)
        return EncodedChunk(joined, [len(document) for document in tokens], text_bytes, bad)


def encode_in_order(
    chunks: Iterator[Chunk], tokenizer_directory: Path, key: str, dtype: str, append_eod: bool, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encode each chunk and yield the results in the order of the chunks.

    Args:
        workers: number of worker processes; 1 encodes in this process.

    Raises:
        UserError: a worker process was killed, for example when memory ran out.
    """
    arguments = (tokenizer_directory, key, dtype, append_eod)
    if workers == 1:
        encoder = _make_encoder(*arguments)
        yield from map(encoder.encode, chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    try:
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            with _sigint_blocked():  # the first submission starts the workers, which inherit the signal mask
                waiting.append(pool.submit(_encode, chunk))
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was ended from outside (out of memory?): try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _make_encoder(tokenizer_directory: Path, key: str, dtype: str, append_eod: bool) -> DocumentEncoder:
    return DocumentEncoder(OPTTokenizer.from_directory(tokenizer_directory), key, dtype, append_eod)


# ---- worker processes ----

_encoder: DocumentEncoder  # of a worker process


def _start_worker(tokenizer_directory: Path, key: str, dtype: str, append_eod: bool) -> None:
    global _encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = _make_encoder(tokenizer_directory, key, dtype, append_eod)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(chunk: Chunk) -> EncodedChunk:
    return _encoder.encode(chunk)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. Processes started in it never receive it; their parent stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
