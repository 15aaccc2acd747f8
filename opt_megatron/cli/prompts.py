"""Reads prompts from arguments, a file or standard input, as text or as token ids."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.jsonl import decode_text, numbered_lines, parse_object, read_text_file
from ..errors import UserError

_JSON_LINES = re.compile(r"\.jsonl?(\.gz)?$", re.IGNORECASE)  # a file's name
_BEGINS_AS_JSON = re.compile(r"""\s*(\[\s*)?\{\s*["']""")  # an object, or a list of them; also one that is damaged


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user gave it: text, or token ids that are used as they are, with options for it alone."""

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def as_given(self) -> str | list[int]:
        """The text or the ids, for the output."""
        return self.text if self.text is not None else list(self.tokens or ())


def read_prompts(texts: list[str] | None, file: str | None, token_lists: list[str] | None) -> list[Prompt]:
    """The prompts of --prompt, --prompt-file and --prompt-tokens, or of standard input where none is given.

    Raises:
        UserError: more than one kind is given, there is no prompt, one is empty, or one cannot be read.
    """
    given = [
        name
        for name, value in (("--prompt", texts), ("--prompt-file", file), ("--prompt-tokens", token_lists))
        if value is not None
    ]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; use one of them")
    if token_lists:
        return [
            Prompt(tokens=parse_ids(text, f"--prompt-tokens {number}")) for number, text in enumerate(token_lists, 1)
        ]
    if texts:
        prompts = [Prompt(text=text) for text in texts]
    elif file is not None:
        prompts = _lines(_read_file(Path(file)), file)
    else:
        prompts = _lines(_read_standard_input(), "standard input")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.text:
            raise UserError(f'prompt {number} is empty; to start from nothing, use --prompt-tokens "2" (BOS alone)')
        try:
            prompt.text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"prompt {number} is not UTF-8 text") from None
    return prompts


def parse_ids(text: str, where: str) -> tuple[int, ...]:
    """The ids in a text such as "2 15 7".

    Args:
        where: how messages begin.

    Raises:
        UserError: something else is in it, or nothing.
    """
    try:
        tokens = tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f"{where}: {text[:60]!r} is not a list of whole numbers") from None
    if not tokens:
        raise UserError(f"{where}: is empty; give at least one id")
    return tokens


def _read_file(path: Path) -> str:
    try:
        return read_text_file(path)
    except ValueError as error:
        raise UserError(f"--prompt-file {path}: {error}") from None


def _read_standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("there is no prompt: give --prompt TEXT, --prompt-file FILE, or pipe one into standard input")
    try:
        return decode_text(sys.stdin.buffer.read())
    except ValueError as error:
        raise UserError(f"standard input: {error}") from None


def _lines(text: str, where: str) -> list[Prompt]:
    lines = numbered_lines(text)
    if not lines:
        raise UserError(f"{where}: holds no prompt")
    if not _JSON_LINES.search(where) and not _BEGINS_AS_JSON.match(lines[0][1]):
        return [Prompt(text=line) for _, line in lines]
    return [_required_json_prompt(line, number, where) for number, line in lines]


def _json_prompt(line: str) -> Prompt | None:
    try:
        value = parse_object(line)
    except ValueError:
        return None
    prompt = value.get("prompt")
    return Prompt(text=prompt, options=value.get("options", {})) if isinstance(prompt, str) else None


def _required_json_prompt(line: str, number: int, where: str) -> Prompt:
    prompt = _json_prompt(line)
    if prompt is None:
        raise UserError(
            f"{where}: line {number} is not a JSON object with a string 'prompt'; a file of JSON lines has one in each "
            "line (a file of text lines has another name than .jsonl, and no object in its first line)"
        )
    if not isinstance(prompt.options, dict):
        raise UserError(f"{where}: line {number}: 'options' is not an object of options and their values")
    return prompt
