"""The bodies of requests: their fields, with kinds and ranges.

The fields of sampling options are made from the declaration of `SamplingParams`. A field that is null has its
default. An unknown field is refused, because a mistyped option that is silently left out would be worse than an error;
fields that clients send, and that change no text, are listed and not used.
Sources: OpenAI's API reference (completions), vLLM's additional fields, metaseq's docs/api.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema

from ..generation.sampling.sampling_params import SamplingParams
from ..options import Option, options_of
from .fields import FIELD_TYPES, MAX_INT, BadWords, LongTokenIds, ModelName, Name, Prompts, Text

_OPTIONS = options_of(SamplingParams)
# Field of the API -> the option of `SamplingParams`.
_OPENAI_FIELDS = {option.api_name: name for name, option in _OPTIONS.items() if option.api_name}
_METASEQ_FIELDS = {
    **{name: _OPENAI_FIELDS[name] for name in ("max_tokens", "min_tokens", "n", "best_of", "echo", "logprobs")},
    **{name: name for name in ("stop", "seed", "temperature", "top_p", "omega_bound", "lambda_decay", "logit_bias")},
    "alpha_presence": "presence_penalty",
    "alpha_frequency": "frequency_penalty",
    "alpha_presence_src": "prompt_presence_penalty",
    "alpha_frequency_src": "prompt_frequency_penalty",
}
# The engine's names of options -> the API's, for messages; where both APIs have the option, OpenAI's.
API_NAMES = {option: field for field, option in [*_METASEQ_FIELDS.items(), *_OPENAI_FIELDS.items()]}
# OpenAI's clients send these to metaseq's routes, too.
_METASEQ_ALIASES = {"presence_penalty": "alpha_presence", "frequency_penalty": "alpha_frequency"}
_UNUSED = "accepted and not used"


class RequestBody(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given, known = {key: item for key, item in value.items() if item is not None}, cls.model_fields
        # One unknown field is reported; an error for each of 200,000 would hold up the event loop.
        for key in [key for key in given if key not in known][1:]:
            del given[key]
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe that every field with a default may be null."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                described = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **described}
        return schema


class SamplingBody(RequestBody):
    """A body with sampling options, which `with_sampling_options` adds."""

    sampling_fields: ClassVar[Mapping[str, str]] = {}

    prompt: Prompts = Field(description="what to continue: texts, or lists of token ids")

    def sampling_options(self) -> dict[str, Any]:
        """The values of the sampling options, by their names in `SamplingParams`."""
        return {option: getattr(self, field) for field, option in self.sampling_fields.items()}

    def given_options(self) -> dict[str, Any]:
        """Those of `sampling_options` that the client gave, and `max_new_tokens`, whose default the API has."""
        values = self.sampling_options()
        given = {option for field, option in self.sampling_fields.items() if field in self.model_fields_set}
        return {option: values[option] for option in given | {"max_new_tokens"}}

    @property
    def num_continuations(self) -> int:
        """The number of continuations that the engine will generate, over all prompts."""
        return len(self.prompt) * self.num_sampled

    @property
    def num_sampled(self) -> int:
        """The number of continuations, or beams, of each prompt."""
        options = self.sampling_options()
        return max(options["n"], options["best_of"] or 1)


AnyBody = TypeVar("AnyBody", bound=SamplingBody)


def with_sampling_options(
    sampling_fields: Mapping[str, str], **overrides: dict[str, Any]
) -> Callable[[type[AnyBody]], type[AnyBody]]:
    """A decorator that adds a field for every sampling option to a body.

    Args:
        sampling_fields: the field's name -> the name of the option in `SamplingParams`.
        overrides: by a field's name, arguments of pydantic's `Field` that replace those of the declaration, and its
            type as `kind`.
    """

    def decorate(cls: type[AnyBody]) -> type[AnyBody]:
        fields: dict[str, Any] = {
            field: _field_of(_OPTIONS[option], overrides.get(field, {})) for field, option in sampling_fields.items()
        }
        made = create_model(cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **fields)
        made.sampling_fields = sampling_fields
        return made

    return decorate


def _field_of(option: Option, overrides: dict[str, Any]) -> tuple[Any, Any]:
    """The type and the `Field` of an option, as `create_model` takes them."""
    kind, default = FIELD_TYPES[option.annotation.removesuffix(" | None")]
    if default is None:
        default = option.default
    if option.choices:
        kind = Literal[option.choices]
    bounds: dict[str, Any] = {} if option.kind.is_list else dict(option.bounds(api=True))
    if kind is int and not {"le", "lt"} & bounds.keys():
        bounds["le"] = MAX_INT
    declared = {"default": default, "description": _description(option), **bounds, **overrides}
    kind = declared.pop("kind", kind)
    return (kind | None if declared["default"] is None else kind), Field(**declared)


def _description(option: Option) -> str:
    """The help text for a command line, with the names of the API's fields."""
    text = option.help.removesuffix("; repeatable")
    return re.sub(r"--([a-z-]+)", lambda match: match[1].replace("-", "_"), text)


class StreamOptions(RequestBody):
    """The field `stream_options`."""

    include_usage: bool = Field(default=False, description="end with a chunk that has the number of tokens")
    continuous_usage_stats: bool = Field(
        default=False, description="with include_usage: put the number of tokens so far into every chunk"
    )
    include_obfuscation: bool = Field(default=True, description=_UNUSED)


class TextFormat(RequestBody):
    """The field `response_format`."""

    type: Literal["text"]


@with_sampling_options(
    _OPENAI_FIELDS,
    max_tokens={"default": None, "description": "new tokens at the most; default: 16"},
    seed={"default": None},
    bad_words={"kind": BadWords},
)
class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    model: ModelName = None
    stream: bool = Field(False, description="send tokens as server-sent events as soon as they are generated")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    use_beam_search: bool = Field(False, description="beam search with best_of (or n) beams, of which n are returned")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=MAX_INT, description="keep this many of the prompt's tokens; -1: as many as fit"
    )
    truncation_side: Literal["left", "right"] = Field(
        "left", description="where truncate_prompt_tokens cuts tokens off: left keeps the last ones"
    )
    add_special_tokens: bool = Field(True, description="begin the prompts that are texts with BOS")
    return_token_ids: bool = Field(False, description="add token_ids and prompt_token_ids to every choice")
    return_tokens_as_token_ids: bool = Field(False, description="name the tokens of logprobs token_id:N")
    suffix: str = Field("", description="must be empty: OPT does not fill in text")
    user: str = Field("", description=_UNUSED)
    spaces_between_special_tokens: bool = Field(True, description=_UNUSED + ": OPT's tokenizer has no such spaces")
    detokenize: bool = Field(True, description=_UNUSED)
    priority: int = Field(0, description=_UNUSED)
    request_id: Name = Field("", description="the response's id is cmpl- and this, or the header X-Request-Id")
    cache_salt: str = Field("", description=_UNUSED)
    session_id: str = Field("", description=_UNUSED)
    stream_interval: int = Field(1, ge=1, description=_UNUSED + ": every token is sent at once")
    response_format: TextFormat | None = Field(None, description="must be text: other formats cannot be enforced")
    metadata: dict[str, Any] = Field({}, description=_UNUSED)

    def given_options(self) -> dict[str, Any]:
        """As in the base class; a beam search also gives the options that make it one."""
        given = super().given_options()
        if self.use_beam_search:
            given |= {"num_beams": self.num_sampled, "best_of": None, "temperature": 0.0}
        return given

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given, but stream is not true")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens is 0, but must be -1, or 1 or more")
        if self.suffix:
            raise ValueError("suffix is not empty, but OPT does not fill in text: leave it out")
        temperature = self.sampling_options()["temperature"]
        if self.use_beam_search and temperature not in (0, 1):
            raise ValueError(f"temperature is {temperature}, but must be 0 or 1 with use_beam_search")
        return self


@with_sampling_options(
    _METASEQ_FIELDS,
    max_tokens={"default": None, "description": "new tokens at the most; default: as many as fit"},
    seed={"default": None},
    top_p={"ge": None, "description": "as in OpenAI's API; 0 and below is greedy"},
    lambda_decay={"gt": None, "default": -1.0, "description": "factual nucleus: its decay; 0 and below is off"},
    omega_bound={"ge": None, "default": 0.3},
    alpha_presence={"description": "as presence_penalty, which is accepted for it; 0 and below is off"},
    alpha_frequency={"description": "as frequency_penalty, which is accepted for it; 0 and below is off"},
)
class MetaseqRequest(SamplingBody):
    """POST /completions and /engines/{engine}/completions. As in metaseq, a number may be given as a string."""

    model_config = ConfigDict(strict=False)

    alpha_src_penalty_end_idx: int = Field(-1, le=0, description="accepted where it is off: 0 and below")
    stream: Literal[False] = Field(False, description="accepted where it is off: not streamed")
    model: str = Field("", description=_UNUSED)
    user: str = Field("", description=_UNUSED)

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, own in _METASEQ_ALIASES.items():
                if name in value and own not in value:
                    value = {**value, own: value[name]}
                    del value[name]
        return value


class TokenizeRequest(RequestBody):
    """POST /tokenize."""

    model: ModelName = None
    prompt: Text = Field(description="the text")
    add_special_tokens: bool = Field(True, description="begin with BOS")
    return_token_strs: bool = Field(False, description="add the tokens as the vocabulary writes them")


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: ModelName = None
    tokens: LongTokenIds = Field(description="the ids")
