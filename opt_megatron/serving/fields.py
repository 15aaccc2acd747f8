"""Types of the fields of request bodies: how pydantic reads them, and how /openapi.json describes them.

Validation runs in the event loop, so every list and object is refused by its length, or at its first wrong item,
before the rest of it is looked at: an error for each of 700,000 items takes seconds.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema

MAX_INT = 2**31 - 1
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_BAD_WORDS = 256  # each is encoded twice, in the event loop
_MAX_BAD_WORD_LENGTH = 100
_MAX_TOKEN_IDS = 1024  # of `logit_bias` and of each list of ids
_MAX_PROMPTS = 10_000
_LARGEST_ID = 10**300  # messages quote a wrong one

TextOrIds = str | list[int]


def _read_prompts(value: Any) -> list[TextOrIds]:
    """A list of prompts, each of them text or ids, from any of the four forms of the field `prompt`."""
    if isinstance(value, str):
        return [_read_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if _is_ids(value):
        return [value]
    if len(value) > _MAX_PROMPTS:
        raise ValueError(f"must have at most {_MAX_PROMPTS} prompts, not {len(value)}")
    return [_read_prompt(prompt) for prompt in value]


def _read_prompt(value: Any) -> TextOrIds:
    if isinstance(value, str):
        return _read_text(value)
    if isinstance(value, list) and value and _is_ids(value):
        return value
    raise ValueError("holds something that is neither a string nor a list of token ids, or an empty list")


def _is_ids(values: list[Any]) -> bool:
    # Whether ids are in the vocabulary is checked later, with the model.
    return set(map(type, values)) == {int} and min(values) > -_LARGEST_ID and max(values) < _LARGEST_ID


def _read_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None
    return value


def _read_stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must be an object of token ids and numbers, as in {"262": -5}')
    if len(value) > _MAX_TOKEN_IDS:
        raise ValueError(f"must have at most {_MAX_TOKEN_IDS} items, not {len(value)}")
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
        raise ValueError("has a key that is not a token id")
    if len({int(key) for key in value}) != len(value):
        raise ValueError("names a token id twice")
    return {int(key): bias for key, bias in value.items()}


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": _MAX_STOP_LENGTH}

Text = Annotated[str, BeforeValidator(_read_text)]
Prompts = Annotated[
    list[TextOrIds],
    BeforeValidator(_read_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TEXTS_SCHEMA,
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]],
    Field(max_length=_MAX_STOPS),  # before the validator, or else it is checked after the items
    BeforeValidator(_read_stop),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": _MAX_STOPS}]}),
]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MAX_BAD_WORD_LENGTH)]], Field(max_length=_MAX_BAD_WORDS)
]
LogitBias = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_read_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "maxProperties": _MAX_TOKEN_IDS,
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[TokenId], FailFast(), Field(max_length=_MAX_TOKEN_IDS)]
LongTokenIds = Annotated[list[TokenId], FailFast(), Field(max_length=1_000_000)]
MAX_NAME_LENGTH = 256
Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
ModelName = Annotated[Name | None, Field(description="a name that /v1/models lists; default: the model that is served")]

# By the annotation of an option: the type of its field over HTTP, and the default if it is not the option's.
FIELD_TYPES: dict[str, tuple[Any, Any]] = {
    "int": (int, None),
    "float": (float, None),
    "bool": (bool, None),
    "str": (str, None),
    "tuple[str, ...]": (Stop, []),
    "tuple[int, ...]": (TokenIds, []),
    "tuple[tuple[int, float], ...]": (LogitBias, {}),
}
