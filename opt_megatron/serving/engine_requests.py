"""From the checked body of an HTTP request to requests of the engine."""

from __future__ import annotations

import asyncio
import re
import secrets
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..generation.request import Request
from ..generation.sampling.sampling_params import SamplingParams
from .errors import ApiError, bad_request, field_of
from .protocol import CompletionBody, MetaseqBody, Prompt
from .served_model import ServedModel

DEFAULT_MAX_TOKENS = 16
# Up to so many characters or ids are encoded or decoded in the event loop; more would delay other requests.
_MAX_IN_EVENT_LOOP = 10_000

# The engine's names of options -> the API's.
_API_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "prompt_presence_penalty": "alpha_presence_src",
    "prompt_frequency_penalty": "alpha_frequency_src",
}


@dataclass(frozen=True)
class EngineRequest:
    """A request of the engine, and what the response needs to know of its prompt.

    Attributes:
        echoed_text: the prompt's text if the response begins with it (`echo`), else empty.
        reports_prompt: the engine makes events for the prompt's tokens.
    """

    request: Request
    echoed_text: str
    reports_prompt: bool


async def encode(model: ServedModel, text: str, add_bos: bool) -> list[int]:
    """The ids of a text; a long text is encoded in a thread, so that other requests go on."""
    if len(text) <= _MAX_IN_EVENT_LOOP:
        return model.tokenizer.encode(text, add_bos=add_bos)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_bos=add_bos)


async def decode(model: ServedModel, tokens: list[int]) -> str:
    """The text of ids; many ids are decoded in a thread, so that other requests go on."""
    if len(tokens) <= _MAX_IN_EVENT_LOOP:
        return model.tokenizer.decode(tokens)
    return await asyncio.to_thread(model.tokenizer.decode, tokens)


async def make_engine_requests(model: ServedModel, body: CompletionBody | MetaseqBody) -> list[EngineRequest]:
    """One request of the engine for every prompt of the body, in their order.

    Raises:
        ApiError: the model cannot continue one of the prompts, or options contradict each other.
    """
    requests = []
    for number, prompt in enumerate(body.prompt, 1):
        what = f"prompt {number}" if len(body.prompt) > 1 else "the prompt"
        # Without a seed, equal prompts must not get equal texts. With one, each gets the text that it would get alone.
        seed = secrets.randbelow(2**63) if body.seed is None else body.seed
        requests.append(await _make_engine_request(model, body, prompt, what, seed))
        await asyncio.sleep(0)  # let the event loop send other requests' tokens between two of many prompts
    return requests


async def _make_engine_request(
    model: ServedModel, body: CompletionBody | MetaseqBody, prompt: Prompt, what: str, seed: int
) -> EngineRequest:
    add_bos = isinstance(prompt, str) and (isinstance(body, MetaseqBody) or body.add_special_tokens)
    ids = await encode(model, prompt, add_bos) if isinstance(prompt, str) else prompt
    if not ids:
        raise bad_request(f"{what} has no tokens; an OPT sequence begins with {model.config.bos_token_id}", "prompt")
    kept = _truncate(ids, _max_prompt_tokens(model, body), keep_bos=add_bos)
    options = (
        _metaseq_options(model, body, len(kept))
        if isinstance(body, MetaseqBody)
        else _openai_options(model, body, len(kept))
    )
    reports_prompt = body.echo and (options["logprobs"] is not None or options["max_new_tokens"] == 0)
    try:
        params = SamplingParams(
            **options,
            min_new_tokens=body.min_tokens,
            n=body.n,
            best_of=body.best_of,
            stop=tuple(body.stop),
            seed=seed,
            echo=reports_prompt,
        )
        request = Request(tuple(kept), params, model.tokenizer.stream)
        model.engine.check(request, what)
    except UserError as error:
        raise engine_error(str(error)) from None
    echoed_text = ""
    if body.echo:
        echoed_text = prompt if isinstance(prompt, str) and len(kept) == len(ids) else model.tokenizer.decode(kept)
    return EngineRequest(request, echoed_text, reports_prompt)


def engine_error(message: str) -> ApiError:
    """The engine's refusal of a request, with the API's names of options."""
    message = re.sub(r"\b\w+\b", lambda word: _API_NAMES.get(word[0], word[0]), message)
    code = "context_length_exceeded" if "positions" in message else None
    return bad_request(message, field_of(message) or "prompt", code)


def _max_prompt_tokens(model: ServedModel, body: CompletionBody | MetaseqBody) -> int | None:
    """The number of tokens that a longer prompt is truncated to; None: it is not truncated."""
    if isinstance(body, MetaseqBody):
        return model.max_model_len - (body.max_tokens or 0) - 1
    if body.truncate_prompt_tokens == -1:
        new_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return model.max_model_len - max(new_tokens, 1)
    return body.truncate_prompt_tokens


def _truncate(ids: list[int], length: int | None, *, keep_bos: bool) -> list[int]:
    """The last `length` ids; with `keep_bos` the first id takes one of the places."""
    if length is None or length < 1 or len(ids) <= length:  # for a length below 1 the engine says what is wrong
        return ids
    return [ids[0], *ids[len(ids) - length + 1 :]] if keep_bos else ids[-length:]


def _remaining_tokens(model: ServedModel, prompt_length: int) -> int:
    return max(1, model.max_model_len - prompt_length)


def _openai_options(model: ServedModel, body: CompletionBody, length: int) -> dict[str, Any]:
    # A default that does not fit is reduced: only a `max_tokens` that was asked for can be an error.
    default = min(DEFAULT_MAX_TOKENS, _remaining_tokens(model, length))
    return {
        "max_new_tokens": default if body.max_tokens is None else body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": tuple(sorted(body.logit_bias.items())),
        "ignore_eos": body.ignore_eos,
        "stop_token_ids": tuple(body.stop_token_ids),
        "include_stop": body.include_stop_str_in_output,
        "logprobs": body.logprobs,
    }


def _metaseq_options(model: ServedModel, body: MetaseqBody, length: int) -> dict[str, Any]:
    greedy = body.temperature == 0 or body.top_p == 0  # as in metaseq
    return {
        "max_new_tokens": _remaining_tokens(model, length) if body.max_tokens is None else body.max_tokens,
        "temperature": 0.0 if greedy else body.temperature,
        "top_p": body.top_p or 1.0,
        "omega_bound": body.omega_bound,
        "lambda_decay": body.lambda_decay,
        "sentence_end_tokens": model.tokenizer.sentence_end_tokens(),
        "presence_penalty": body.alpha_presence,
        "frequency_penalty": body.alpha_frequency,
        "prompt_presence_penalty": body.alpha_presence_src,
        "prompt_frequency_penalty": body.alpha_frequency_src,
        "logprobs": body.logprobs or 0,  # its responses always have them
    }
