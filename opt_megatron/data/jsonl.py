"""JSON-lines files: one object a line, in UTF-8 with or without a byte order mark, also `.gz`.

`read_chunks` streams files of any size for worker processes; `parse_lines` and `read_texts` go through them line by
line and skip bad lines;
`read_text_file` and `numbered_lines` read a small file as a whole. `parse_object`, `get_string` and `get_text`
check one line and say in the ValueError's message what is wrong with it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from ..errors import UserError
from ..files import open_input

T = TypeVar("T")
_CHUNK_BYTES = 2**20
_MOST_LINE_BYTES = 2**27
_MOST_TEXT_BYTES = 2**30
_REPORTED_LINES = 5
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors write it


# ---- files ----


class Chunk(NamedTuple):
    """Consecutive whole lines of one file, about a mebibyte."""

    path: str
    first_line: int  # counted from 1
    lines: list[bytes]


def check_inputs(paths: Sequence[str]) -> None:
    """Raise UserError unless each path is a file that can be read."""
    if not paths:
        raise UserError("no input file was given")
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{path}: is a directory; give the files in it")
        try:
            with open_input(path):
                pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{path}: cannot be read: {reason}") from None


def read_chunks(paths: Sequence[str], progress: Callable[[int], Any] = lambda _: None) -> Iterator[Chunk]:
    """Read the lines of the files in order; `.gz` files are decompressed.

    Args:
        progress: called with the number of (compressed) bytes read since its last call.

    Raises:
        UserError: a `.gz` file is damaged or not compressed.
    """
    for path in paths:
        with open_input(path) as raw, _decompressed(path, raw) as file:
            line, position = 1, 0
            while lines := _read_lines(path, file):
                if line == 1:
                    lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
                yield Chunk(path, line, lines)
                line += len(lines)
                progress(raw.tell() - position)
                position = raw.tell()


def _decompressed(path: str, raw: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(raw)) if path.endswith(".gz") else raw


def _read_lines(path: str, file: IO[bytes]) -> list[bytes]:
    """The next lines, at least one and about a mebibyte; none at the end."""
    lines, size = [], 0
    try:
        while size < _CHUNK_BYTES and (line := file.readline(_MOST_LINE_BYTES + 1)):
            if len(line) > _MOST_LINE_BYTES:
                raise UserError(f"{path}: has a line of more than {_MOST_LINE_BYTES:,} bytes: are these JSON lines?")
            lines.append(line)
            size += len(line)
        return lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None


def read_text_file(path: Path) -> str:
    """The whole text of a file, `.gz` or not.

    Raises:
        ValueError: it cannot be read, unpacked or decoded; the message says which.
    """
    try:
        with open_input(path) as raw, _decompressed(str(path), raw) as file:
            content = file.read(_MOST_TEXT_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(content) > _MOST_TEXT_BYTES:
        raise ValueError(f"has more than the {_MOST_TEXT_BYTES:,} bytes that are read as one text")
    return decode_text(content)


def decode_text(content: bytes) -> str:
    """UTF-8 bytes as a string, without a byte order mark.

    Raises:
        ValueError: they are not UTF-8; the message names the first bad byte, counted from 0.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} cannot be read)") from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers, counted from 1; ends of lines are `\\n` or `\\r\\n`."""
    # str.splitlines() would also split at characters such as U+2028, which may be part of a text.
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    return [(number, line) for number, line in lines if line.strip()]


# ---- lines ----


def parse_object(line: bytes | str) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        ValueError: the line holds no object; the message says why.
    """
    line = line.strip()
    if not line:
        raise ValueError("is empty")
    try:
        value = json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, endless nesting
        raise ValueError(f"is not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("is not an object, {...}")
    return value


def get_text(value: dict[str, Any], key: str) -> str:
    """The string under `key` without trailing white space.

    Raises:
        ValueError: there is no string, or nothing but white space; the message says why.
    """
    text = get_string(value, key).rstrip()
    if not text:
        raise ValueError(f"{key!r} is empty")
    return text


def get_string(value: dict[str, Any], key: str) -> str:
    """The string under `key`.

    Raises:
        ValueError: there is none, or it cannot be encoded in UTF-8; the message says why.
    """
    if key not in value:
        raise ValueError(f"has no {key!r}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a string")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{key!r} has half of a surrogate pair, which is no text")
    return text


def parse_lines(
    paths: Sequence[str], parse: Callable[[bytes], T], bad: BadLines, *, strict: bool = False
) -> Iterator[T]:
    """The result of `parse` for each line; lines for which it raises a ValueError are added to `bad`.

    Raises:
        UserError: a line is bad and `strict` is set, or a file cannot be decompressed.
    """
    for chunk in read_chunks(paths):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                parsed = parse(line)
            except ValueError as error:
                bad.add([BadLine(chunk.path, number, str(error))], strict=strict)
            else:
                yield parsed


def read_texts(paths: Sequence[str], key: str, bad: BadLines, *, strict: bool = False) -> Iterator[str]:
    """The texts under `key` of all lines; otherwise as `parse_lines`."""
    return parse_lines(paths, lambda line: get_text(parse_object(line), key), bad, strict=strict)


# ---- bad lines ----


class BadLine(NamedTuple):
    """A line that was skipped, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class BadLines:
    """The number of lines that were skipped, and the first few of them."""

    count: int = 0
    first: list[BadLine] = field(default_factory=list)

    def add(self, lines: Sequence[BadLine], *, strict: bool = False) -> None:
        """Count skipped lines.

        Raises:
            UserError: `lines` is not empty and `strict` is set.
        """
        if strict and lines:
            raise UserError(f"{lines[0]} (with --strict no line may be bad)")
        self.count += len(lines)
        self.first += lines[: _REPORTED_LINES - len(self.first)]

    def report(self) -> list[str]:
        """Lines for the user; an empty list if nothing was skipped."""
        if not self.count:
            return []
        more = f", the first {len(self.first)}:" if self.count > len(self.first) else ":"
        return [f"skipped {self.count} bad line{'s' if self.count > 1 else ''}{more}", *map(str, self.first)]
