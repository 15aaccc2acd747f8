"""Texts to evaluate on: JSON lines with a text each, or a plain text file, which is one text."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import UserError

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_texts(path: Path, json_key: str = "text") -> list[str]:
    """The texts of a file; `.jsonl`, `.ndjson` and `.json` (in any case) have an object a line, all else is one text.

    Raises:
        UserError: it cannot be read, is not UTF-8, or a line is not an object with a string under the key.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: is not UTF-8 (byte {error.start} cannot be read)") from None
    if path.suffix.lower() not in _JSON_LINES:
        return [text]
    # Not splitlines(): that would also cut at characters like U+2028, which may stand in a JSON string.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_text_of(line, json_key, f"--data {path}, line {number}") for number, line in lines]


def _text_of(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON: {str(error)[:100]}") from None
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: is not an object with a string under {key!r} (--json-key names another)")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair, which is no text") from None
    return text
