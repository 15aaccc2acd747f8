"""What may be asked: the bodies of requests, with the kinds and bounds of their fields.

A field that is null has its default. An unknown field is refused: a mistyped option that is silently left out
would be worse than an error. Sources: OpenAI's API reference (completions), vLLM's extras, metaseq's docs/api.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from .errors import ApiError, bad_request, field_of
from .strict_json import parse_object

MOST_CHOICES = 128  # of a prompt
MOST_LOGPROBS = 20
_MOST_STOPS = 16
_MOST_BIASES = 1024
_MOST_TOKENS = 2**31 - 1
_LONGEST_NAME = 256

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """A list of prompts, each text or ids, from any of the four forms."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if all(type(token) is int for token in value):
        return [value]
    return [_one_prompt(prompt) for prompt in value]


def _one_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise ValueError("holds something that is neither a string nor a list of token ids, or an empty list")


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None
    return value


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError('must be an object of token ids and numbers, as in {"262": -5}')
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
        raise ValueError("has a key that is not a token id")
    if len({int(key) for key in value}) != len(value):
        raise ValueError("names a token id twice")
    return {int(key): bias for key, bias in value.items()}


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}),
]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[
    list[Stop],
    BeforeValidator(_stops),
    Field(max_length=_MOST_STOPS),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 1000},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 1000},
                    "maxItems": _MOST_STOPS,
                },
            ]
        }
    ),
]
Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_biases),
    Field(max_length=_MOST_BIASES),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "maxProperties": _MOST_BIASES,
        }
    ),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(max_length=_LONGEST_NAME)]
TokenId = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class Sampling(Body):
    """Fields that OpenAI's completions and metaseq's share."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=_MOST_TOKENS, description="default: 16")
    min_tokens: int = Field(0, ge=0, le=_MOST_TOKENS)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    stop: Stops = []
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)


class StreamOptions(Body):
    """Of `stream_options`."""

    include_usage: bool = False


class CompletionBody(Sampling):
    """POST /v1/completions."""

    model: Name | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = {}
    user: Name | None = Field(None, description="accepted and not used")
    top_k: int = Field(0, ge=-1, le=_MOST_TOKENS, description="0 and -1 keep all")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field([], max_length=_MOST_BIASES)
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=_MOST_TOKENS, description="keep so many of the prompt's last tokens; -1: as many as fit"
    )
    add_special_tokens: bool = Field(True, description="begin a text with BOS")

    @model_validator(mode="after")
    def _check(self) -> CompletionBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given, but stream is not true")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0, but must be -1, or 1 or more")
        return self


class MetaseqBody(Sampling):
    """POST /completions and /engines/{engine}/completions."""

    top_p: float = Field(1.0, ge=0, le=1, description="0 is greedy")
    omega_bound: float = Field(0.0, ge=0, le=1)
    lambda_decay: float = Field(1.0, gt=0, le=1)
    alpha_presence: Penalty = 0.0
    alpha_frequency: Penalty = 0.0
    alpha_presence_src: Penalty = 0.0
    alpha_frequency_src: Penalty = 0.0


class TokenizeBody(Body):
    """POST /tokenize."""

    model: Name | None = None
    prompt: Annotated[str, BeforeValidator(lambda value: _text(value) if isinstance(value, str) else value)]
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Name | None = None
    tokens: list[TokenId] = Field(max_length=1_000_000)


AnyBody = TypeVar("AnyBody", bound=Body)


def read(kind: type[AnyBody], body: bytes) -> AnyBody:
    """The body as one of the above.

    Raises:
        ApiError: it is not JSON, or a field is unknown, missing, of the wrong kind or out of its range.
    """
    values = parse_object(body)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    """The first thing that is wrong, as a sentence."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(map(str, first["loc"]))
    field = ascii(path)[1:-1][:80]
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no field {field!r}", field, "unknown_field")
    if first["type"] == "missing":
        return bad_request(f"{field} is missing", field)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"^\w+ should have", "must have", message).replace(" after validation", "")
    if not field:  # what is said of several fields begins with the one that is wrong
        return bad_request(message, field_of(message))
    return bad_request(f"{field}: {message}", field)
