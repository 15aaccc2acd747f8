"""Texts to evaluate on: JSON lines with a text each, or a plain text file, which is one text."""

from __future__ import annotations

from pathlib import Path

from ..data.jsonl import get_string, numbered_lines, parse_object, read_text_file
from ..errors import UserError

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_documents(path: Path, json_key: str = "text") -> list[str]:
    """The texts of a file; `.jsonl`, `.ndjson` and `.json` (in any case) have an object a line, all else is one text.

    Any of them may be compressed, with `.gz` after its name.

    Raises:
        UserError: it cannot be read, is not UTF-8, or a line is not an object with a string under the key.
    """
    try:
        text = read_text_file(path)
    except ValueError as error:
        raise UserError(f"--data {path}: {error}") from None
    if not path.name.lower().removesuffix(".gz").endswith(_JSON_LINES):
        return [text]
    return [_text_of(line, json_key, f"--data {path}, line {number}") for number, line in numbered_lines(text)]


def _text_of(line: str, key: str, where: str) -> str:
    try:
        value = parse_object(line)
        if not isinstance(value.get(key), str):
            raise ValueError(f"is not an object with a string under {key!r} (--json-key names another)")
        return get_string(value, key)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
