"""From the engine's events to the choices of an answer, whole or in pieces.

A choice is `{"index", "text", "logprobs", "finish_reason"}`; pieces of one are joined by putting texts and lists
behind one another. Its log-probabilities are OpenAI's: tokens, token_logprobs, top_logprobs, text_offset.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..generation.request import TokenEvent
from .errors import ApiError
from .job import Arrival
from .prompts import Prepared, in_terms_of_api
from .served import ServedModel

Choice = dict[str, Any]


class Answer:
    """The answer to one request.

    Args:
        logprobs: choices have log-probabilities.
    """

    def __init__(self, model: ServedModel, prompts: Sequence[Prepared], *, logprobs: bool) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._writers = [
            [
                ChoiceWriter(model, prompt, index * prompt.request.params.n + number, logprobs)
                for number in range(copies)
            ]
            for index, prompt in enumerate(prompts)
            if (copies := prompt.request.params.n)
        ]
        self._prompt_tokens = sum(len(prompt.request.prompt) for prompt in prompts)
        self._new_tokens = 0

    def take(self, arrivals: Sequence[Arrival]) -> list[Choice]:
        """The pieces of choices that the events add.

        Raises:
            ApiError: the engine could not go on with a prompt.
        """
        pieces = []
        for index, event in arrivals:
            if event.token is None:
                raise _ending(event)
            writers = self._writers[index]
            if event.is_prompt and event.finish_reason is None:
                for writer in writers:
                    writer.hold(event)
                continue
            self._new_tokens += not event.is_prompt
            pieces.append(writers[event.choice].write(event))
        return pieces

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; each prompt counts once."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._new_tokens,
            "total_tokens": self._prompt_tokens + self._new_tokens,
        }

    def whole(self, pieces: Sequence[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {**self._head, "choices": join(pieces), "usage": self.usage}

    def chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A chunk of a stream."""
        return {**self._head, "choices": list(choices)}


class ChoiceWriter:
    """Writes the pieces of one choice."""

    def __init__(self, model: ServedModel, prompt: Prepared, index: int, logprobs: bool) -> None:
        self._model = model
        self._index = index
        self._prefix = prompt.text  # what comes before the first new text
        self._held: list[TokenEvent] = []  # the prompt's, until there is a new one
        self._has_logprobs = logprobs
        self._prompt_length = len(prompt.text)
        self._is_in_prompt = prompt.echoed
        self._decoder = model.tokenizer.stream()
        self._offset = 0 if prompt.echoed else len(prompt.text)

    def hold(self, event: TokenEvent) -> None:
        """Keep one of the prompt's events for the next piece."""
        if self._has_logprobs:
            self._held.append(event)

    def write(self, event: TokenEvent) -> Choice:
        """A piece that the event makes, with the echoed prompt before the first."""
        # An event of the prompt brings its text again, which is in the prefix already.
        text = self._prefix + ("" if event.is_prompt else event.text)
        events, self._prefix, self._held = [*self._held, event], "", []
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(events) if self._has_logprobs else None,
            "finish_reason": event.finish_reason,
        }

    def _logprobs(self, events: list[TokenEvent]) -> dict[str, list]:
        name = self._model.token_text
        tops = [
            _top(event, name(event.token), [(name(token), value) for token, value in event.top_logprobs])
            for event in events
        ]
        return {
            "tokens": [name(event.token) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": tops,
            "text_offset": [self._next_offset(event) for event in events],
        }

    def _next_offset(self, event: TokenEvent) -> int:
        """Where the token begins in the choice's text, in characters (of a half character, where it will stand)."""
        if self._is_in_prompt and not event.is_prompt:  # the new text is decoded by itself, behind the whole prompt
            self._is_in_prompt, self._offset = False, self._prompt_length
            self._decoder = self._model.tokenizer.stream()
        begin = self._offset
        self._offset += len(self._decoder.push(event.token))
        return begin


def _top(event: TokenEvent, chosen: str, likeliest: list[tuple[str, float]]) -> dict[str, float] | None:
    if event.logprob is None:  # the first token of a sequence
        return None
    return dict(likeliest) | {chosen: event.logprob}


def _ending(event: TokenEvent) -> ApiError:
    if event.finish_reason == "refused":
        return in_terms_of_api(event.text)
    if event.finish_reason == "failed":
        return ApiError(500, f"an error of the server ended the request: {event.text}", code="internal_error")
    return ApiError(503, "the request was cancelled", code="cancelled")


def join(pieces: Sequence[Choice]) -> list[Choice]:
    """Whole choices, in the order of their indices, of their pieces."""
    parts: dict[int, list[Choice]] = {}
    for piece in pieces:
        parts.setdefault(piece["index"], []).append(piece)
    return [_join_one(parts[index]) for index in sorted(parts)]


def _join_one(pieces: list[Choice]) -> Choice:
    logprobs = None
    if pieces[0]["logprobs"] is not None:
        logprobs = {
            name: [item for piece in pieces for item in piece["logprobs"][name]] for name in pieces[0]["logprobs"]
        }
    text = "".join(piece["text"] for piece in pieces)
    return {
        "index": pieces[0]["index"],
        "text": text,
        "logprobs": logprobs,
        "finish_reason": pieces[-1]["finish_reason"],
    }


def as_metaseq(answer: dict[str, Any]) -> dict[str, Any]:
    """The same answer in the shape of metaseq's API (metaseq/service/responses.py, class OAIResponse).

    There the reason why a choice ended stands among its log-probabilities (and is always "length"; here it is true).
    """
    choices = [
        {
            "text": choice["text"],
            "logprobs": {**choice["logprobs"], "finish_reason": choice["finish_reason"]},
            "metrics": None,
        }
        for choice in answer["choices"]
    ]
    return {**{name: answer[name] for name in ("id", "object", "created", "model")}, "choices": choices}
