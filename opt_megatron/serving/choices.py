"""One choice of a completion response: from the engine's events to deltas, and from these to the whole choice.

A choice is `{"index", "text", "logprobs", "finish_reason", "stop_reason"}`. A delta is a choice with what one token
adds: the deltas of a choice are merged by concatenating their texts and lists. Log-probabilities have OpenAI's form:
`tokens`, `token_logprobs`, `top_logprobs`, `text_offset`. As in vLLM, whole choices also have `prompt_logprobs`,
`token_ids` and `prompt_token_ids`, which are null unless a request asks for them; deltas have them only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from ..generation.request import TextDecoder, TokenEvent
from .engine_requests import EngineRequest
from .served_model import ServedModel

Choice = dict[str, Any]


class ChoiceBuilder:
    """Makes the deltas of one choice; the first one has what is returned of the prompt.

    Args:
        index: of the choice in the response.
        token_name: how log-probabilities name an id.
        returns_token_ids: of the prompt and of the continuation.
    """

    def __init__(
        self,
        model: ServedModel,
        engine_request: EngineRequest,
        index: int,
        token_name: Callable[[int], str],
        returns_token_ids: bool,
    ) -> None:
        self._model, self._token_name = model, token_name
        self._index = index
        self._request = engine_request.request
        self._returns_token_ids = returns_token_ids
        self._echoed_text = engine_request.echoed_text
        self._prompt_events: list[TokenEvent] = []
        self._is_first = True
        self._offsets = _TextOffsets(model, engine_request)

    def add_prompt_token(self, event: TokenEvent) -> None:
        """Keep a token of the prompt for the first delta."""
        self._prompt_events.append(event)

    def to_delta(self, event: TokenEvent) -> Choice:
        """What the next token adds, or an end without a token."""
        params = self._request.params
        is_first, self._is_first = self._is_first, False
        new = [] if event.token is None else [event]
        shown = self._prompt_events + new if is_first and params.echo else new
        delta = {
            "index": self._index,
            "text": (self._echoed_text if is_first else "") + event.text,
            "logprobs": None if params.logprobs is None else self._logprobs(shown, params.logprobs),
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
        }
        if self._returns_token_ids:
            delta["token_ids"] = [_token_of(event) for event in new]
        if self._returns_token_ids and is_first:
            delta["prompt_token_ids"] = list(self._request.prompt)
        if params.prompt_logprobs is not None and is_first:
            delta["prompt_logprobs"] = [self._prompt_logprobs(event) for event in self._prompt_events]
        return delta

    def _logprobs(self, events: Sequence[TokenEvent], num_top: int) -> dict[str, list[Any]]:
        return {
            "tokens": [self._token_name(_token_of(event)) for event in events],
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [self._top_logprobs(event, num_top) for event in events],
            "text_offset": [self._offsets.next(event) for event in events],
        }

    def _top_logprobs(self, event: TokenEvent, num_top: int) -> dict[str, float] | None:
        if event.logprob is None:  # the first token of a sequence has no probability
            return None
        name = self._token_name
        if self._request.params.logprob_token_ids and not event.is_prompt:
            num_top = len(event.top_logprobs)
        # The chosen token is the first, as in vLLM, whose clients rely on it.
        return {name(_token_of(event)): event.logprob} | {
            name(token): logprob for token, logprob in event.top_logprobs[:num_top]
        }

    def _prompt_logprobs(self, event: TokenEvent) -> dict[str, dict[str, Any]] | None:
        """vLLM's form."""
        if event.logprob is None:
            return None
        token = _token_of(event)
        scores: dict[int, tuple[float, int | None]] = {token: (event.logprob, event.vocab_rank)}
        scores |= {other: (logprob, rank) for rank, (other, logprob) in enumerate(event.top_logprobs, 1)}
        return {
            str(other): {"logprob": logprob, "rank": rank, "decoded_token": self._model.token_text(other)}
            for other, (logprob, rank) in scores.items()
        }


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
    merged = {**deltas[0], "text": "".join(delta["text"] for delta in deltas)}
    merged |= {name: merged.get(name) for name in ("prompt_logprobs", "prompt_token_ids", "token_ids")}
    if merged["logprobs"] is not None:
        merged["logprobs"] = {name: _joined(delta["logprobs"][name] for delta in deltas) for name in merged["logprobs"]}
    if merged["token_ids"] is not None:
        merged["token_ids"] = _joined(delta["token_ids"] for delta in deltas)
    return merged | {name: deltas[-1][name] for name in ("finish_reason", "stop_reason")}


def _joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))
