"""From the engine's events to the body of a completion response, complete or in chunks.

A choice is `{"index", "text", "logprobs", "finish_reason"}`. A delta is a choice with what one token adds: the deltas
of a choice are merged by concatenating their texts and lists. Log-probabilities have OpenAI's form: `tokens`,
`token_logprobs`, `top_logprobs`, `text_offset`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..generation.request import TokenEvent
from .engine_requests import EngineRequest, engine_error
from .errors import ApiError
from .request_output import PromptEvent
from .served_model import ServedModel

Choice = dict[str, Any]


class ResponseBuilder:
    """Builds the response to one HTTP request.

    Args:
        requests: the engine requests of its prompts, in their order.
    """

    def __init__(self, model: ServedModel, requests: Sequence[EngineRequest]) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._choices = [  # [prompt][choice]; a choice's index counts over all prompts
            [
                ChoiceBuilder(model, item, prompt_index * item.request.params.n + choice)
                for choice in range(item.request.params.n)
            ]
            for prompt_index, item in enumerate(requests)
        ]
        self._prompt_tokens = sum(len(item.request.prompt) for item in requests)
        self._completion_tokens = 0

    def add_events(self, events: Sequence[PromptEvent]) -> list[Choice]:
        """Read the next events; return the deltas that they make.

        Raises:
            ApiError: the engine refused or failed to run a prompt, or its request was cancelled.
        """
        deltas = []
        for prompt_index, event in events:
            if event.token is None:
                raise _error_of(event)
            choices = self._choices[prompt_index]
            if event.is_prompt and event.finish_reason is None:
                for choice in choices:
                    choice.add_prompt_token(event.token, event)
                continue
            self._completion_tokens += not event.is_prompt
            deltas.append(choices[event.choice].to_delta(event.token, event))
        return deltas

    @property
    def usage(self) -> dict[str, int]:
        """Number of tokens so far; a prompt counts once, however many continuations it has."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def to_response(self, deltas: Sequence[Choice]) -> dict[str, Any]:
        """The body of a response that is not streamed, from all deltas."""
        return {**self._head, "choices": merge_deltas(deltas), "usage": self.usage}

    def to_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The data of one event of a stream."""
        return {**self._head, "choices": list(choices)}


class ChoiceBuilder:
    """Makes the deltas of one choice.

    Args:
        index: of the choice in the response.
    """

    def __init__(self, model: ServedModel, engine_request: EngineRequest, index: int) -> None:
        params = engine_request.request.params
        self._model = model
        self._index = index
        self._has_logprobs = params.logprobs is not None
        self._echoed_text = engine_request.echoed_text  # goes into the first delta
        self._prompt_tokens: list[tuple[int, TokenEvent]] = []  # so do the log-probabilities of these
        # State of `text_offset`.
        self._decoder = model.tokenizer.stream()
        self._is_in_prompt = params.echo
        self._prompt_length = len(engine_request.echoed_text)
        self._offset = 0 if params.echo else self._prompt_length

    def add_prompt_token(self, token: int, event: TokenEvent) -> None:
        """Keep a token of the prompt for the first delta."""
        if self._has_logprobs:
            self._prompt_tokens.append((token, event))

    def to_delta(self, token: int, event: TokenEvent) -> Choice:
        """The delta of the next token; the first one begins with the echoed prompt."""
        # The event of a prompt's token carries text that `_echoed_text` has already.
        text = self._echoed_text + ("" if event.is_prompt else event.text)
        tokens = [*self._prompt_tokens, (token, event)]
        self._echoed_text, self._prompt_tokens = "", []
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(tokens) if self._has_logprobs else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, tokens: list[tuple[int, TokenEvent]]) -> dict[str, list]:
        return {
            "tokens": [self._model.token_text(token) for token, _ in tokens],
            "token_logprobs": [event.logprob for _, event in tokens],
            "top_logprobs": [self._top_logprobs(token, event) for token, event in tokens],
            "text_offset": [self._next_offset(token, event) for token, event in tokens],
        }

    def _top_logprobs(self, token: int, event: TokenEvent) -> dict[str, float] | None:
        if event.logprob is None:  # the first token of a sequence has no probability
            return None
        name = self._model.token_text
        return {name(other): logprob for other, logprob in event.top_logprobs} | {name(token): event.logprob}

    def _next_offset(self, token: int, event: TokenEvent) -> int:
        """Where the token begins in the choice's text, in characters.

        A token that completes no character has the offset that the character will have.
        """
        if self._is_in_prompt and not event.is_prompt:  # the continuation is decoded separately from the prompt
            self._is_in_prompt, self._offset = False, self._prompt_length
            self._decoder = self._model.tokenizer.stream()
        begin = self._offset
        self._offset += len(self._decoder.push(token))
        return begin


def _error_of(event: TokenEvent) -> ApiError:
    if event.finish_reason == "refused":
        return engine_error(event.text)
    if event.finish_reason == "failed":
        return ApiError(500, f"an error of the server ended the request: {event.text}", code="internal_error")
    return ApiError(503, "the request was cancelled", code="cancelled")


def merge_deltas(deltas: Sequence[Choice]) -> list[Choice]:
    """Complete choices, in the order of their indices."""
    by_index: dict[int, list[Choice]] = {}
    for delta in deltas:
        by_index.setdefault(delta["index"], []).append(delta)
    return [_merge_choice(by_index[index]) for index in sorted(by_index)]


def _merge_choice(deltas: list[Choice]) -> Choice:
    logprobs = None
    if deltas[0]["logprobs"] is not None:
        logprobs = {
            name: [item for delta in deltas for item in delta["logprobs"][name]] for name in deltas[0]["logprobs"]
        }
    return {
        "index": deltas[0]["index"],
        "text": "".join(delta["text"] for delta in deltas),
        "logprobs": logprobs,
        "finish_reason": deltas[-1]["finish_reason"],
    }


def to_metaseq(response: dict[str, Any]) -> dict[str, Any]:
    """The response in the form of metaseq's API (metaseq/service/responses.py, class OAIResponse).

    There `finish_reason` is a key of `logprobs`. metaseq always writes "length"; here it is the actual reason.
    """
    choices = [
        {
            "text": choice["text"],
            "logprobs": {**choice["logprobs"], "finish_reason": choice["finish_reason"]},
            "metrics": None,
        }
        for choice in response["choices"]
    ]
    return {**{name: response[name] for name in ("id", "object", "created", "model")}, "choices": choices}
