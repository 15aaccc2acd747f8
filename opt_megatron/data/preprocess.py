"""From JSON lines to Megatron's indexed format, as fast as the disk and the tokenizer allow.

    lines -> chunks of about a mebibyte -> workers: JSON, ids -> one writer, in the order of the lines

A document is `text.rstrip()`, followed by `</s>` with `append_eod`; there is no BOS. The output does not depend on
the number of workers, and memory does not depend on the size of the files (except for the index: a few bytes for
each document).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..tokenizer import OPTTokenizer
from .document_encoder import encode_in_order
from .indexed_writer import IndexedWriter
from .jsonl import BadLines, check_inputs, read_chunks
from .tokenizer_record import tokenizer_record, write_tokenizer_record


@dataclass
class PreprocessResult:
    """What was written under `{prefix}.bin` and `.idx`, with a record of the tokenizer under `.json`."""

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
) -> PreprocessResult:
    """Write `{output_prefix}_{json_key}_document.bin` and `.idx`, complete or not at all.

    Args:
        inputs: JSON lines, each an object with a text under `json_key`; also `.gz`.
        strict: a bad line is an error; otherwise it is skipped.
        progress: called with the number of bytes of the inputs read since its last call.

    Raises:
        UserError: the files cannot be read or hold no document, or the output exists and `force` is not set.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}, but must be at least 1")
    if not json_key or "/" in json_key:
        raise UserError(f"--json-key {json_key!r} cannot be part of a file name")
    check_inputs(inputs)
    tokenizer = OPTTokenizer.from_directory(tokenizer_directory)
    result = PreprocessResult(f"{output_prefix}_{json_key}_document")
    with IndexedWriter(result.prefix, len(tokenizer), force=force) as writer:
        started = time.monotonic()  # after the import of megatron-core
        result.dtype = writer.dtype
        chunks = read_chunks(inputs, progress)
        encoded = encode_in_order(chunks, tokenizer_directory, json_key, writer.dtype, append_eod, workers)
        with contextlib.closing(encoded):
            for chunk in encoded:
                result.bad.add(chunk.bad, strict=strict)
                writer.add(chunk)
                result.documents += len(chunk.lengths)
                result.tokens += len(chunk.tokens)
                result.text_bytes += chunk.text_bytes
        if not result.documents:
            raise UserError("; ".join(["the input holds no documents", *result.bad.report()]))
        tokenizer_record(result.prefix).unlink(missing_ok=True)  # an old one must not appear beside new files
        writer.publish()
        write_tokenizer_record(result.prefix, tokenizer)
        result.seconds = time.monotonic() - started
    return result
