"""From the checked body of an HTTP request to requests of the engine."""

from __future__ import annotations

import asyncio
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import UserError
from ..generation.request import Request
from ..generation.sampling.sampling_params import SamplingParams
from .errors import ApiError, bad_request, field_of
from .fields import TextOrIds
from .protocol import API_NAMES, CompletionRequest, MetaseqRequest
from .served_model import ServedModel

DEFAULT_MAX_TOKENS = 16
# Up to this many characters or ids are encoded or decoded in the event loop; more would delay other requests.
_MAX_IN_EVENT_LOOP = 10_000
# Of one response. More would take the event loop more than half a second to write.
_MAX_LOGPROBS = 500_000
# One thread, because a long text takes a core, and up to 400 times its size in memory, for as long as it is encoded.
_LONG_TEXTS = ThreadPoolExecutor(1, "long-texts")


@dataclass(frozen=True)
class EngineRequest:
    """A request of the engine, and what the response needs to know of its prompt.

    Attributes:
        echoed_text: the prompt's text if the response begins with it (`echo`), else empty.
        text_offset: where the continuation begins, in characters, in what `text_offset` of log-probabilities counts.
    """

    request: Request
    echoed_text: str
    text_offset: int


async def encode(model: ServedModel, text: str, add_bos: bool) -> list[int]:
    """The ids of a text; a long text is encoded in a thread, so that other requests go on."""
    if len(text) <= _MAX_IN_EVENT_LOOP:
        return model.tokenizer.encode(text, add_bos=add_bos)
    encode_batch = partial(model.tokenizer.encode_batch, [text], add_bos=add_bos)
    (ids,) = await asyncio.get_running_loop().run_in_executor(_LONG_TEXTS, encode_batch)
    return ids


async def decode(model: ServedModel, tokens: list[int]) -> str:
    """The text of ids and special tokens; many are decoded in a thread, so that other requests go on."""
    decode_all = partial(model.tokenizer.decode, tokens, skip_special_tokens=False)
    if len(tokens) <= _MAX_IN_EVENT_LOOP:
        return decode_all()
    return await asyncio.get_running_loop().run_in_executor(_LONG_TEXTS, decode_all)


async def make_engine_requests(model: ServedModel, body: CompletionRequest | MetaseqRequest) -> list[EngineRequest]:
    """One request of the engine for every prompt of the body, in their order.

    Raises:
        ApiError: the model cannot continue one of the prompts, or options contradict each other.
    """
    options = body.sampling_options() | model.generation_config.with_defaults(body.given_options())
    options |= _watermark(model, body)
    options["bad_word_ids"] = model.tokenizer.bad_word_ids(options.get("bad_words", ()))
    requests: list[EngineRequest] = []
    num_logprobs = 0
    for number, prompt in enumerate(body.prompt, 1):
        label = f"prompt {number}" if len(body.prompt) > 1 else "the prompt"
        requests.append(await _make_engine_request(model, body, options, prompt, label))
        num_logprobs += _num_logprobs(requests[-1].request)
        if num_logprobs > _MAX_LOGPROBS:
            raise bad_request(
                f"the response would have more than {_MAX_LOGPROBS} log-probabilities: ask for fewer, or split the "
                "request",
                "logprobs",
            )
        await asyncio.sleep(0)  # let the event loop send other requests' tokens between two of many prompts
    return requests


def _watermark(model: ServedModel, body: CompletionRequest | MetaseqRequest) -> dict[str, Any]:
    """The options of the server's own watermark, if it has one.

    Raises:
        ApiError: a request has such an option, too.
    """
    if model.watermark.mark == 0:
        return {}
    options = model.watermark.watermark()
    for name in options.keys() & body.given_options().keys():
        raise bad_request(
            f"{name} is given, but this server marks every text with its own watermark: leave it out", name
        )
    return options


def _num_logprobs(request: Request) -> int:
    """The largest number of log-probabilities in the response; those of the prompt are in every choice."""
    params, of_prompt, of_output = request.params, 0, 0
    if params.num_prompt_logprobs is not None:
        of_prompt = len(request.prompt) * (1 + params.num_prompt_logprobs)
    if params.logprobs is not None:
        of_output = params.max_new_tokens * (1 + max(params.logprobs, len(params.logprob_token_ids)))
    return params.n * (of_prompt + of_output)


async def _make_engine_request(
    model: ServedModel,
    body: CompletionRequest | MetaseqRequest,
    options: dict[str, Any],
    prompt: TextOrIds,
    label: str,
) -> EngineRequest:
    add_bos = isinstance(prompt, str) and (isinstance(body, MetaseqRequest) or body.add_special_tokens)
    ids = await encode(model, prompt, add_bos) if isinstance(prompt, str) else prompt
    if not ids:
        raise bad_request(f"{label} has no tokens; an OPT sequence begins with {model.config.bos_token_id}", "prompt")
    length = _max_prompt_tokens(model, body, options["max_new_tokens"])
    from_right = isinstance(body, CompletionRequest) and body.truncation_side == "right"
    kept = _truncate(ids, length, from_right=from_right, keep_bos=add_bos)
    try:
        request = Request(tuple(kept), _sampling_params(model, body, options, len(kept)), model.tokenizer.stream)
        model.engine.check(request, label)
    except UserError as error:
        raise engine_error(str(error)) from None
    text = ""
    if options["echo"] or options["logprobs"] is not None:
        text = prompt if isinstance(prompt, str) and len(kept) == len(ids) else _prompt_text(model, request)
    echoed_text = text if options["echo"] else ""
    # OpenAI's offsets begin at the prompt, whether it is echoed or not, metaseq's at the text of the response.
    return EngineRequest(request, echoed_text, len(echoed_text if isinstance(body, MetaseqRequest) else text))


def _prompt_text(model: ServedModel, request: Request) -> str:
    """The text of a prompt of ids: with its special tokens, except for BOS at the beginning.

    Half of a character at its end is left out, because the continuation completes it, unless there is none.
    """
    decoder = model.tokenizer.stream(skip_special_tokens=False)
    ids = request.prompt[1:] if request.prompt[0] == model.config.bos_token_id else request.prompt
    text = "".join([decoder.push(token) for token in ids])
    return text if request.params.max_new_tokens else text + decoder.flush()


def engine_error(message: str) -> ApiError:
    """The engine's refusal of a request, with the API's names of options."""
    message = re.sub(r"\b\w+\b", lambda word: API_NAMES.get(word[0], word[0]), message)
    field, code = field_of(message) or "prompt", None
    if positions := re.search(r"(\d+) positions", message):
        # Clients such as litellm recognise this error by the code, or by these words of OpenAI's message.
        code = "context_length_exceeded"
        message = f"this model's maximum context length is {positions[1]} tokens: {message}"
    return bad_request(message, field, code)


def _max_prompt_tokens(
    model: ServedModel, body: CompletionRequest | MetaseqRequest, max_new_tokens: int | None
) -> int | None:
    """The number of tokens that a longer prompt is truncated to; None: it is not truncated."""
    if isinstance(body, MetaseqRequest):
        return model.max_model_len - (max_new_tokens or 0) - 1
    if body.truncate_prompt_tokens == -1:
        return model.max_model_len - max(DEFAULT_MAX_TOKENS if max_new_tokens is None else max_new_tokens, 1)
    return body.truncate_prompt_tokens


def _truncate(ids: list[int], length: int | None, *, from_right: bool, keep_bos: bool) -> list[int]:
    """The last `length` ids, or the first ones; with `keep_bos` the first id is one of them."""
    if length is None or length < 1 or len(ids) <= length:  # for a length below 1 the engine says what is wrong
        return ids
    if from_right:
        return ids[:length]
    return [ids[0], *ids[len(ids) - length + 1 :]] if keep_bos else ids[-length:]


def _sampling_params(
    model: ServedModel, body: CompletionRequest | MetaseqRequest, options: dict[str, Any], prompt_length: int
) -> SamplingParams:
    """The engine's options; those of a body may be None, or have values that only its API knows."""
    remaining = max(1, model.max_model_len - prompt_length)
    # Without a seed, equal prompts must not get equal texts. With one, each gets the text that it would get alone.
    seed = secrets.randbelow(2**63) if options["seed"] is None else options["seed"]
    options = {**options, "seed": seed, "best_of": options["best_of"] or None}  # both APIs take 0 for n
    if isinstance(body, MetaseqRequest):
        options |= _metaseq_options(model, options, remaining)
    else:
        options |= _openai_options(options, remaining)
    # The engine reports the prompt's tokens only where they are needed: not for their text alone.
    options["echo"] = options["echo"] and options["logprobs"] is not None
    return SamplingParams(**options)


def _openai_options(options: dict[str, Any], remaining: int) -> dict[str, Any]:
    # A default that does not fit is reduced: only a `max_tokens` that was asked for can be an error.
    default = min(DEFAULT_MAX_TOKENS, remaining)
    return {
        "max_new_tokens": default if options["max_new_tokens"] is None else options["max_new_tokens"],
        "top_k": max(0, options["top_k"]),
    }


def _metaseq_options(model: ServedModel, options: dict[str, Any], remaining: int) -> dict[str, Any]:
    # Below 0 these are off in metaseq, and top-p is greedy.
    signed = [name for name in options if name.endswith("_penalty")] + ["top_p", "omega_bound"]
    return {
        **{name: max(0.0, options[name]) for name in signed},
        "lambda_decay": options["lambda_decay"] if options["lambda_decay"] > 0 else 1.0,
        "max_new_tokens": remaining if options["max_new_tokens"] is None else options["max_new_tokens"],
        "sentence_end_tokens": model.tokenizer.sentence_end_tokens(),
        "logprobs": options["logprobs"] or 0,  # its responses always have them
    }
