"""Tokens that were added to a tokenizer after its training, and which tokens are special, from transformers' files.

The files are read as transformers reads them (tokenization_utils_base.py, `_from_pretrained`): where
tokenizer_config.json has `added_tokens_decoder`, that alone; otherwise special_tokens_map.json, added_tokens.json and
tokenizer.json's `added_tokens`. A special token that these name and that has no id yet gets the next free one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .errors import CheckpointError
from .files import read_text

_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def read_added_tokens(directory: Path, vocab: dict[str, int]) -> dict[int, AddedToken]:
    """The added tokens of a directory by their ids, those among them that `vocab` has already too.

    Args:
        vocab: of vocab.json: token string -> id.

    Raises:
        CheckpointError: two tokens have one id, or one token has two.
    """
    config = _read_object(directory / "tokenizer_config.json")
    if isinstance(config.get("added_tokens_decoder"), dict):
        added = {int(index): _token(value) for index, value in config["added_tokens_decoder"].items()}
        special = list(_special_tokens(config))
    else:
        special = list(_special_tokens(config | _read_object(directory / "special_tokens_map.json")))
        added = _legacy_tokens(directory, {token.content for token in special})
    ids = vocab | {token.content: index for index, token in added.items()}
    for token in special:
        added.setdefault(ids.setdefault(token.content, max(ids.values()) + 1), token).special = True
    _check_ids(added, vocab)
    return added


def _legacy_tokens(directory: Path, special: set[str]) -> dict[int, AddedToken]:
    """Of added_tokens.json, and of tokenizer.json, which says more of each."""
    added = {
        index: _token(content, normalized=content not in special, special=content in special)
        for content, index in _read_object(directory / "added_tokens.json").items()
    }
    listed = _read_object(directory / "tokenizer.json").get("added_tokens") or []
    return added | {int(value["id"]): _token(value) for value in listed}


def _special_tokens(values: dict[str, Any]) -> Iterator[AddedToken]:
    """The tokens of the keys bos_token, pad_token and the like, and of the lists of further ones."""
    for key, value in values.items():
        if key.endswith("_token") and isinstance(value, str | dict):
            yield _token(value, special=True)
        elif key in _SPECIAL_LISTS:
            for item in value.values() if isinstance(value, dict) else value or ():
                yield _token(item, special=True)


def _token(value: Any, **flags: bool) -> AddedToken:
    """A token as the files write it: its text alone, or an object with its flags."""
    fields = {"content": value} if isinstance(value, str) else {name: value[name] for name in _FIELDS if name in value}
    if not isinstance(fields.get("content"), str) or not fields["content"]:
        raise CheckpointError(f"an added token has no text: {str(value)[:80]!r}")
    return AddedToken(**fields | flags)


def _check_ids(added: dict[int, AddedToken], vocab: dict[str, int]) -> None:
    names = {index: content for content, index in vocab.items()}
    ids = dict(vocab)
    for index, token in added.items():
        content = token.content
        if index < 0:
            raise CheckpointError(f"the added token {content!r} has the id {index}; ids begin at 0: correct its files")
        if names.get(index, content) != content or ids.setdefault(content, index) != index:
            other = f"{names[index]!r} has it" if index in names else f"it has the id {ids[content]} too"
            raise CheckpointError(f"the added token {content!r} has the id {index}, but {other}: correct its files")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value
