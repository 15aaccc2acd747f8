"""Prompts from files: plain lines or JSON lines, compressed or not."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from opt_megatron.cli.prompts import Prompt, read_prompts
from opt_megatron.errors import UserError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Once\n\n the king \r\n", [Prompt("Once"), Prompt(" the king ")]),
        ('\ufeff{"prompt": "Once", "options": {"seed": 3}}\n', [Prompt("Once", options={"seed": 3})]),
    ],
)
def test_a_compressed_file_is_read_as_the_plain_one(tmp_path: Path, content: str, expected: list[Prompt]) -> None:
    plain, packed = tmp_path / "prompts", tmp_path / "prompts.gz"
    plain.write_bytes(content.encode())
    packed.write_bytes(gzip.compress(content.encode()))
    assert read_prompts(None, str(plain), None) == read_prompts(None, str(packed), None) == expected


def test_a_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.gz").write_bytes(b"Once")
    with pytest.raises(UserError, match=r"--prompt-file .*prompts.gz: cannot be unpacked"):
        read_prompts(None, str(tmp_path / "prompts.gz"), None)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("p.jsonl", '{"prmpt": "x"}'),
        ("p.txt", '{"prompt": "The king", "opt'),
        ("p.json.gz", "Once"),
        ("p", '{"prompt": 3}'),
        ("p.txt", "{'prompt': 'The king'}"),
        ("p", '[{"prompt": "The king"},'),
    ],
)
def test_json_lines_that_begin_with_a_damaged_one_are_refused(tmp_path: Path, name: str, first: str) -> None:
    content = f'\n{first}\n{{"prompt": "The queen"}}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match="line 2 is not a JSON object with a string 'prompt'"):
        read_prompts(None, str(tmp_path / name), None)


def test_a_text_may_begin_with_a_brace(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("{ x | x > 0 } is\n{}\n")
    assert read_prompts(None, str(tmp_path / "p"), None) == [Prompt("{ x | x > 0 } is"), Prompt("{}")]
