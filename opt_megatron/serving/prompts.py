"""From a checked body to the engine's requests."""

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
from .protocol import CompletionBody, MetaseqBody, Prompt, Sampling
from .served import ServedModel

DEFAULT_MAX_TOKENS = 16
_SHORT = 10_000  # characters that are encoded, or ids decoded, without leaving the event loop

# The engine's names of options -> the API's.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "prompt_presence_penalty": "alpha_presence_src",
    "prompt_frequency_penalty": "alpha_frequency_src",
}


@dataclass(frozen=True)
class Prepared:
    """A prompt that the engine can run.

    Attributes:
        text: what `echo` shows of it.
        echoed: the prompt's tokens are reported by the engine.
    """

    request: Request
    text: str
    echoed: bool


async def encode(model: ServedModel, text: str, add_bos: bool) -> list[int]:
    """Ids of a text; a long one is encoded in a thread, so that other requests go on."""
    if len(text) <= _SHORT:
        return model.tokenizer.encode(text, add_bos=add_bos)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_bos=add_bos)


async def decode(model: ServedModel, tokens: list[int]) -> str:
    """The text of ids; many are decoded in a thread, so that other requests go on."""
    if len(tokens) <= _SHORT:
        return model.tokenizer.decode(tokens)
    return await asyncio.to_thread(model.tokenizer.decode, tokens)


async def prepare(model: ServedModel, body: CompletionBody | MetaseqBody) -> list[Prepared]:
    """Every prompt of the body as a request to the engine, in their order.

    Raises:
        ApiError: the model cannot run one of them, or options contradict each other.
    """
    prepared = []
    for number, prompt in enumerate(body.prompt, 1):
        what = f"prompt {number}" if len(body.prompt) > 1 else "the prompt"
        # Without a seed equal prompts must not get equal texts; with one, each gets what it would get alone.
        seed = secrets.randbelow(2**63) if body.seed is None else body.seed
        prepared.append(await _prepare(model, body, prompt, what, seed))
        await asyncio.sleep(0)  # a list of a thousand prompts must not hold up the others' tokens
    return prepared


async def _prepare(model: ServedModel, body: Sampling, prompt: Prompt, what: str, seed: int) -> Prepared:
    metaseq = isinstance(body, MetaseqBody)
    add_bos = metaseq or body.add_special_tokens
    is_text = isinstance(prompt, str)
    ids = await encode(model, prompt, add_bos) if is_text else prompt
    if not ids:
        raise bad_request(f"{what} has no tokens; an OPT sequence begins with {model.config.bos_token_id}", "prompt")
    kept = _cut(model, body, ids, bos=is_text and add_bos)
    options = _metaseq_options(model, body, len(kept)) if metaseq else _openai_options(model, body, len(kept))
    echoed = body.echo and (options["logprobs"] is not None or options["max_new_tokens"] == 0)
    try:
        params = SamplingParams(
            **options,
            min_new_tokens=body.min_tokens,
            n=body.n,
            best_of=body.best_of,
            stop=tuple(body.stop),
            seed=seed,
            echo=echoed,
        )
        request = Request(tuple(kept), params, model.tokenizer.stream)
        model.engine.check(request, what)
    except UserError as error:
        raise in_terms_of_api(str(error)) from None
    text = (prompt if is_text and kept is ids else model.tokenizer.decode(kept)) if body.echo else ""
    return Prepared(request, text, echoed)


def in_terms_of_api(message: str) -> ApiError:
    """A refusal of the engine with the API's names of options."""
    message = re.sub(r"\b\w+\b", lambda word: _NAMES.get(word[0], word[0]), message)
    code = "context_length_exceeded" if "positions" in message else None
    return bad_request(message, field_of(message) or "prompt", code)


def _cut(model: ServedModel, body: Sampling, ids: list[int], bos: bool) -> list[int]:
    """The last tokens of a prompt, as many as are to be kept; the BOS of a text stays."""
    if isinstance(body, MetaseqBody):
        longest = model.positions - (body.max_tokens or 0) - 1
    elif body.truncate_prompt_tokens == -1:
        longest = model.positions - max(_or_default(body.max_tokens), 1)
    else:
        longest = body.truncate_prompt_tokens or len(ids)
    if len(ids) <= longest or longest < 1:  # where nothing would be left, the engine tells what is wrong
        return ids
    return [ids[0], *ids[len(ids) - longest + 1 :]] if bos else ids[-longest:]


def _or_default(max_tokens: int | None) -> int:
    return DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens


def _room(model: ServedModel, length: int) -> int:
    return max(1, model.positions - length)


def _openai_options(model: ServedModel, body: CompletionBody, length: int) -> dict[str, Any]:
    default = min(DEFAULT_MAX_TOKENS, _room(model, length))  # what was not asked for is not an error
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
        "max_new_tokens": _room(model, length) if body.max_tokens is None else body.max_tokens,
        "temperature": 0.0 if greedy else body.temperature,
        "top_p": body.top_p or 1.0,
        "omega_bound": body.omega_bound,
        "lambda_decay": body.lambda_decay,
        "sentence_end_tokens": model.tokenizer.sentence_end_tokens(),
        "presence_penalty": body.alpha_presence,
        "frequency_penalty": body.alpha_frequency,
        "prompt_presence_penalty": body.alpha_presence_src,
        "prompt_frequency_penalty": body.alpha_frequency_src,
        "logprobs": body.logprobs or 0,  # its answers always have them
    }
