"""The kinds of values that an option may have: how each is checked, converted, and read from a command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..errors import UserError

Size = int  # bytes, which may be given as people write them: 500MB, 2GiB
_LARGEST_SIZE = 10**18  # bytes, more than any machine has


@dataclass(frozen=True)
class Kind:
    """How the values of one annotation are read.

    Attributes:
        convert: takes a name for messages and a value; returns the value in its own type (numpy's numbers as Python's,
            lists as tuples). Raises UserError.
        word: makes a value of one word of a command line; None for a switch, which has no word.
        is_list: there may be several values.
        noun: what such a value is called in the reference pages.
    """

    convert: Callable[[str, Any], Any]
    word: Callable[[str], Any] | None
    is_list: bool
    noun: str


def kind_of(annotation: str) -> Kind:
    """The kind of a field by its annotation, with or without `| None`.

    Raises:
        KeyError: there is no such kind.
    """
    return _KINDS[annotation.removesuffix(" | None")]


def shown(value: Any) -> str:
    """A value as messages write it: its repr, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def size_in_bytes(text: str) -> int:
    """Bytes of a size as people write it: 500MB, 5GB (powers of ten), 2GiB (powers of two), 4096B.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?(B?)", text.strip(), re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UserError(f"{text!r} is not a size; write it as 500MB, 5GB or 2GiB")
    if not match[2] and not match[4] and float(match[1]):
        raise UserError(f"{text!r} has no unit; write {match[1]}GB, {match[1]}GiB or {match[1]}B")
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    if size > _LARGEST_SIZE:
        raise UserError(f"{text[:40]!r} is more than any machine has; write it as 500MB, 5GB or 2GiB")
    return int(size)


def _whole(name: str, value: Any) -> int:
    _require(_is_whole(value), name, value, "a whole number")
    return int(value)


def _number(name: str, value: Any) -> float:
    _require(isinstance(value, Real) and not isinstance(value, bool), name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        raise UserError(f"{name} is {shown(value)}, which is more than a number can be") from None
    return value if isinstance(value, int) else number


def _switch(name: str, value: Any) -> bool:
    _require(isinstance(value, bool), name, value, "true or false")
    return bool(value)


def _text(name: str, value: Any) -> str:
    _require(isinstance(value, str), name, value, "a string")
    return str(value)


def _size(name: str, value: Any) -> int:
    if isinstance(value, str):
        return size_in_bytes(value)
    _require(_is_whole(value) and 0 <= value <= _LARGEST_SIZE, name, value, "a size, as 500MB, 5GB or 2GiB")
    return int(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    good = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    _require(good, name, value, "a string or a list of strings")
    return tuple(texts)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(_is_whole, value))
    _require(good, name, value, "a list of ids")
    return tuple(map(int, value))


def _id_sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    _require(isinstance(value, Sequence) and not isinstance(value, str | bytes), name, value, "a list of lists of ids")
    return tuple(_ids(name, ids) for ids in value)


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs, of a mapping too; an item may also be a text such as 262=-5, and a mapping's key the id as a text."""
    items = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = [_pair_of_text(item) if isinstance(item, str) else _pair_of(*item) for item in items]
        return tuple((_whole(name, token), _number(name, bias)) for token, bias in pairs)
    except _NotAPairError as error:
        raise UserError(str(error)) from None
    except (TypeError, ValueError):
        raise UserError(f"{name} is {shown(value)}, but must be ids with a number each") from None


class _NotAPairError(Exception):
    """A text that is not an id and a number."""


def _pair_of(token: Any, bias: Any) -> tuple[Any, Any]:
    return _pair_of_text(f"{token}={bias}") if isinstance(token, str) else (token, bias)


def _pair_of_text(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise _NotAPairError(f"logit bias {text!r} is not an id and a number, as in 262=-5") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:  # the text is made only now: every request makes these checks
        raise UserError(f"{name} is {shown(value)}, but must be {wanted}")


_KINDS = {
    "int": Kind(_whole, int, False, "whole number"),
    "float": Kind(_number, float, False, "number"),
    "bool": Kind(_switch, None, False, "switch"),
    "str": Kind(_text, str, False, "text"),
    "Size": Kind(_size, str, False, "size"),
    "tuple[str, ...]": Kind(_texts, str, True, "list of texts"),
    "tuple[int, ...]": Kind(_ids, int, True, "list of ids"),
    "tuple[tuple[int, ...], ...]": Kind(_id_sequences, str, True, "list of lists of ids"),
    "tuple[tuple[int, float], ...]": Kind(_biases, str, True, "ids with a number each"),
}
