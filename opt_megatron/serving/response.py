"""From the engine's events to the body of a completion response, complete or in chunks.

Its choices are those of `choices.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..generation.request import TokenEvent
from .choices import Choice, ChoiceBuilder, merge_deltas
from .engine_requests import EngineRequest, engine_error
from .errors import ApiError
from .request_output import PromptEvent
from .served_model import ServedModel

_ERRORS = ("cancelled", "refused", "failed")  # finish reasons


class ResponseBuilder:
    """Builds the response to one HTTP request.

    Args:
        requests: the engine requests of its prompts, in their order.
        request_id: the client's name for the request, which becomes part of the response's id.
        returns_token_ids: choices have `token_ids` and `prompt_token_ids`.
        names_ids: the tokens of log-probabilities are named `token_id:N`.
    """

    def __init__(
        self,
        model: ServedModel,
        requests: Sequence[EngineRequest],
        *,
        request_id: str = "",
        returns_token_ids: bool = False,
        names_ids: bool = False,
    ) -> None:
        token_name = "token_id:{}".format if names_ids else model.token_text
        self._head = {
            "id": f"cmpl-{request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._choices = [  # [prompt][choice]; a choice's index counts over all prompts
            [
                ChoiceBuilder(model, item, prompt_index * item.request.params.n + choice, token_name, returns_token_ids)
                for choice in range(item.request.params.n)
            ]
            for prompt_index, item in enumerate(requests)
        ]
        self._prompt_tokens = sum(len(item.request.prompt) for item in requests)
        self._cached_tokens: dict[int, int] = {}  # by the prompt
        self._completion_tokens = 0

    def add_events(self, events: Sequence[PromptEvent]) -> Iterator[Choice]:
        """Read the next events, and give the deltas that they make; `usage` counts the tokens up to each.

        Raises:
            ApiError: the engine refused or failed to run a prompt, or its request was cancelled.
        """
        for prompt_index, event in events:
            if event.finish_reason in _ERRORS:
                raise _error_of(event)
            choices = self._choices[prompt_index]
            if event.is_prompt:
                for choice in choices:
                    choice.add_prompt_token(event)
                continue
            # A prompt's second continuation finds the prompt in the cache: what counts is what the first found.
            cached = self._cached_tokens.get(prompt_index, event.num_cached_tokens)
            self._cached_tokens[prompt_index] = min(cached, event.num_cached_tokens)
            self._completion_tokens += event.token is not None
            yield choices[event.choice].to_delta(event)

    @property
    def usage(self) -> dict[str, Any]:
        """Number of tokens so far; a prompt counts once, however many continuations it has."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def to_response(self, deltas: Sequence[Choice]) -> dict[str, Any]:
        """The body of a response that is not streamed, from all deltas."""
        return {**self._head, "choices": merge_deltas(deltas), "usage": self.usage}

    def to_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The data of one event of a stream."""
        return {**self._head, "choices": list(choices)}


def _error_of(event: TokenEvent) -> ApiError:
    if event.finish_reason == "refused":
        return engine_error(event.text)
    if event.finish_reason == "failed":
        return ApiError(500, f"an error of the server ended the request: {event.text}", code="internal_error")
    return ApiError(503, "the request was cancelled", code="cancelled")


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
