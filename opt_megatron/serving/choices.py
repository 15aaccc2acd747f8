"""One choice of a completion response: from the engine's events to deltas, and from these to the whole choice.

A choice is `{"index", "text", "logprobs", "finish_reason"}`. A delta is a choice with what one token adds: the deltas
of a choice are merged by concatenating their texts and lists. Log-probabilities have OpenAI's form: `tokens`,
`token_logprobs`, `top_logprobs`, `text_offset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation.request import TextDecoder, TokenEvent
from .engine_requests import EngineRequest
from .served_model import ServedModel

Choice = dict[str, Any]


class ChoiceBuilder:
    """Makes the deltas of one choice; the first one has what is returned of the prompt.

    Args:
        index: of the choice in the response.
    """

    def __init__(self, model: ServedModel, engine_request: EngineRequest, index: int) -> None:
        request = engine_request.request
        self._model = model
        self._index = index
        self._num_logprobs = request.params.logprobs
        self._echoed_text = engine_request.echoed_text
        self._prompt_events: list[TokenEvent] = []
        self._is_first = True
        self._offsets = _TextOffsets(model, engine_request)

    def add_prompt_token(self, event: TokenEvent) -> None:
        """Keep a token of the prompt for the first delta."""
        self._prompt_events.append(event)

    def to_delta(self, event: TokenEvent) -> Choice:
        """What the next token adds, or an end without a token."""
        events = [] if event.token is None else [event]
        if self._is_first:
            events = self._prompt_events + events
        delta = {
            "index": self._index,
            "text": (self._echoed_text if self._is_first else "") + event.text,
            "logprobs": None if self._num_logprobs is None else self._logprobs(events),
            "finish_reason": event.finish_reason,
        }
        self._is_first = False
        return delta

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._model.token_text(_token_of(event)) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [self._top_logprobs(event) for event in events],
            "text_offset": [self._offsets.next(event) for event in events],
        }

    def _top_logprobs(self, event: TokenEvent) -> dict[str, float] | None:
        if event.logprob is None:  # the first token of a sequence has no probability
            return None
        name, token = self._model.token_text, _token_of(event)
        return {name(other): logprob for other, logprob in event.top_logprobs} | {name(token): event.logprob}


class _TextOffsets:
    """Where each token begins in the text, in characters.

    A token that completes no character has the offset that the character will have.
    """

    def __init__(self, model: ServedModel, engine_request: EngineRequest) -> None:
        self._bos = model.config.bos_token_id
        self._prompt_decoder: TextDecoder = model.tokenizer.stream(skip_special_tokens=False)
        self._prompt_offset = 0
        self._decoder = engine_request.request.make_decoder()
        self._offset = engine_request.text_offset

    def next(self, event: TokenEvent) -> int:
        """The offset of the next token."""
        if event.is_prompt:
            return self._next_of_prompt(event)
        assert self._decoder is not None  # the server's requests have a tokenizer
        begin = self._offset
        self._offset += len(self._decoder.push(_token_of(event)))
        return begin

    def _next_of_prompt(self, event: TokenEvent) -> int:
        begin = self._prompt_offset
        is_first = event.logprob is None
        if not (is_first and event.token == self._bos):  # which is not shown
            self._prompt_offset += len(self._prompt_decoder.push(_token_of(event)))
        return begin


def _token_of(event: TokenEvent) -> int:
    assert event.token is not None
    return event.token


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
