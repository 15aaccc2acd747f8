"""A model directory's generation_config.json: where its texts end, which tokens it never writes, how it samples.

The sampling options are those that vLLM follows (vllm/config/model.py, `get_diff_sampling_param`), and typical_p. They
are defaults: what a request gives itself comes first. As in vLLM, sampling needs no `do_sample: true`; `do_sample:
false` is temperature 0, as in transformers. Searches (num_beams ...) are never taken from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shorten
from ..files import read_text
from .sampling.sampling_params import SamplingParams

FILE_NAME = "generation_config.json"
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_FOLLOWED = (*_OF_SAMPLING, "repetition_penalty", "max_new_tokens", "begin_suppress_tokens")
# What else changes a text in transformers (generation/configuration_utils.py), with the values that change nothing.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "min_new_tokens": (0,),
    "min_length": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "guidance_scale": (1,),
    "stop_strings": ([],),
    "watermarking_config": ({},),
}


@dataclass(frozen=True)
class GenerationConfig:
    """What the file says, as far as it is followed.

    Attributes:
        eos_token_ids: each of them ends a text; None where the file names none, and config.json's does.
        suppress_tokens: ids that are never generated.
        defaults: options of `SamplingParams` for requests that do not give them.
        not_followed: other keys of the file that change texts in transformers.
    """

    eos_token_ids: tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    not_followed: tuple[str, ...] = ()

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a request gives, and the file's; of sampling none, where the request asks for a search."""
        is_search = options.get("num_beams", 1) != 1 or options.get("penalty_alpha", 0) != 0
        left_out = _OF_SAMPLING if is_search else ()
        return {name: value for name, value in self.defaults.items() if name not in left_out} | dict(options)

    def describe(self, eos_token_id: int) -> str:
        """The file's effect in a line, for the user; empty where it has none.

        Args:
            eos_token_id: of config.json.
        """
        told = []
        if self.eos_token_ids not in (None, (eos_token_id,)):
            told.append(f"eos_token_id {_in_words(self.eos_token_ids)}")
        if self.suppress_tokens:
            told.append(f"suppress_tokens {_in_words(self.suppress_tokens)}")
        if self.defaults:
            values = ", ".join(f"{name} {_in_words(value)}" for name, value in self.defaults.items())
            told.append(f"where nothing else is given {values}")
        if self.not_followed:
            told.append(f"not followed: {', '.join(self.not_followed)}")
        return f"{FILE_NAME}: {'; '.join(told)} (--no-generation-config leaves it out)" if told else ""


def read_generation_config(directory: Path, vocab_size: int) -> GenerationConfig:
    """The file in a model's directory; one without effect where there is none.

    Args:
        vocab_size: ids from this one on are dropped, as transformers does.

    Raises:
        CheckpointError: it cannot be read, or a value is of the wrong kind or out of its range.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return GenerationConfig()
    try:
        values = json.loads(read_text(path))
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__}, not an object")
        values = {name: value for name, value in values.items() if value is not None}
        return GenerationConfig(
            eos_token_ids=_ids(values, "eos_token_id", vocab_size) or None,
            suppress_tokens=_ids(values, "suppress_tokens", vocab_size),
            defaults=_defaults(values, vocab_size),
            not_followed=tuple(n for n, off in _NOT_FOLLOWED.items() if n in values and values[n] not in off),
        )
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error} (--no-generation-config leaves the file out)") from None


def _defaults(values: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    defaults = {name: values[name] for name in _FOLLOWED if name in values}
    if "begin_suppress_tokens" in values:
        defaults["begin_suppress_tokens"] = _ids(values, "begin_suppress_tokens", vocab_size)
    if values.get("do_sample") is False:
        defaults["temperature"] = 0.0
    SamplingParams(**defaults)  # checks them
    unset = SamplingParams()
    return {name: value for name, value in defaults.items() if value != getattr(unset, name)}


def _ids(values: dict[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """The ids of an integer or a list of integers that are in the vocabulary."""
    value = values.get(name, [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"{name} is {repr(value)[:80]}, not an id or a list of ids")
    return tuple(token for token in ids if 0 <= token < vocab_size)


def _in_words(value: Any) -> str:
    return shorten([str(item) for item in value], 8) if isinstance(value, tuple) else f"{value:g}"
