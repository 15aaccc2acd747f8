"""JSON lines: chunks, whole files, `.gz`, byte order marks, and lines that are no objects."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from opt_megatron.data import jsonl
from opt_megatron.data.jsonl import (
    BadLines,
    decode_text,
    get_text,
    numbered_lines,
    parse_object,
    read_chunks,
    read_text_file,
    read_texts,
)
from opt_megatron.errors import UserError

LINES = b"".join(json.dumps({"text": f"text {number}"}).encode() + b"\n" for number in range(3))


def test_compressed_files_are_read_as_the_plain_ones(tmp_path: Path) -> None:
    plain, packed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    plain.write_bytes(LINES)
    packed.write_bytes(gzip.compress(LINES))
    read: list[int] = []
    chunks = list(read_chunks([str(packed)], read.append))
    assert [chunk.lines for chunk in chunks] == [chunk.lines for chunk in read_chunks([str(plain)])]
    assert sum(read) == packed.stat().st_size
    assert read_text_file(packed) == read_text_file(plain) == LINES.decode()


@pytest.mark.parametrize("content", [gzip.compress(LINES)[:-9], b"plain text"])
def test_damaged_compressed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(content)
    with pytest.raises(UserError, match=r"x.jsonl.gz: cannot be unpacked"):
        list(read_chunks([str(packed)]))
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_text_file(packed)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES)
    assert read_text_file(path) == LINES.decode()
    assert list(read_texts([str(path)], "text", BadLines())) == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 1 cannot be read\)"):
        decode_text(b"a\xff")


def test_lines_keep_their_numbers_and_only_end_at_line_feeds() -> None:
    assert numbered_lines("a\u2028b\r\n\n \nc") == [(1, "a\u2028b"), (4, "c")]


def test_bad_lines_are_counted_and_with_strict_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES + b"[]\n" * 7)
    bad = BadLines()
    assert len(list(read_texts([str(path)], "text", bad))) == 3
    assert bad.report()[:2] == ["skipped 7 bad lines, the first 5:", f"{path}:4: is not an object, {{...}}"]
    with pytest.raises(UserError, match=r":4: is not an object, {...} \(with --strict no line may be bad\)"):
        list(read_texts([str(path)], "text", BadLines(), strict=True))


def test_texts_lose_white_space_at_their_end_alone() -> None:
    for line in ('{"text": " a \\n"}', b' {"text": " a "}\r\n'):
        assert get_text(parse_object(line), "text") == " a"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_line_or_text_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(jsonl, "_MOST_LINE_BYTES", 1000)
    monkeypatch.setattr(jsonl, "_MOST_TEXT_BYTES", 1000)
    path = tmp_path / ("x.gz" if compressed else "x")
    content = b"a" * 1000 + b"b\n"
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match="has a line of more than 1,000 bytes"):
        list(jsonl.read_chunks([str(path)]))
    with pytest.raises(ValueError, match="has more than the 1,000 bytes"):
        jsonl.read_text_file(path)


@pytest.mark.timeout(10)
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match="x: cannot be read: is a named pipe"):
        jsonl.check_inputs([str(tmp_path / "x")])
