"""The engine's input and output: requests, events of tokens, and completions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..config import OPTConfig
from ..errors import UserError
from .sampling.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "refused", "failed"]
TopLogProbs = tuple[tuple[int, float], ...]


_LONGEST_CHARACTER = 4  # bytes, and a token has at least one


class TextDecoder(Protocol):
    """Turns ids into text one at a time (for example the tokenizer's StreamDecoder)."""

    def push(self, token: int) -> str:
        """The text that is complete with `token`; possibly none."""

    def flush(self) -> str:
        """The text that was held back because it is incomplete."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, BOS included.
        decoder: makes a decoder for the events' text, a new one for every continuation (`tokenizer.stream`, which
            takes `skip_special_tokens`); without it text is empty and stop strings cannot be used.
        client: on whose behalf; each client has the same share of the batch (`core/scheduler.py`).
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    decoder: Callable[..., TextDecoder] | None = None
    client: int = 0

    def make_decoder(self) -> TextDecoder | None:
        """A decoder of a continuation; if the prompt ends within a character, the continuation completes it."""
        if self.decoder is None:
            return None
        decoder = self.decoder(skip_special_tokens=self.params.skip_special_tokens)
        for token in self.prompt[-_LONGEST_CHARACTER:]:
            decoder.push(token)
        return decoder


@dataclass(frozen=True)
class TokenEvent:
    """One token, or an end without one: of a request that was cancelled or refused, failed, or wants no new tokens.

    Attributes:
        request: the request's id: its index in the list given to `generate`, or what `RequestQueue.put` returned.
        token: its id; an end-of-sequence token is reported too. None at an end without a token.
        text: what this token adds to the text, possibly nothing (half a character, the start of a stop string);
            the reason where a request is refused or has failed.
        finish_reason: on the last event of a continuation, else None.
        choice: which of the request's `n` continuations.
        logprob: natural logarithm of the model's own probability, before any processor; None where it is not
            asked for, and for the first token of a prompt.
        top_logprobs: the likeliest ids with their log-probabilities, best first, or those of `logprob_token_ids`.
        is_prompt: a token of the prompt, where `echo` or `prompt_logprobs` asks for them (with choice 0, before all
            others).
        num_cached_tokens: of the prompt, those whose keys and values were copied from another sequence instead of
            computed; in all events of a continuation.
        stop_reason: the stop string, or the id of `stop_token_ids`, that ended the continuation; None if an
            end-of-sequence token or the length did.
        vocab_rank: with `prompt_logprobs`, the rank of a prompt's token in the vocabulary by probability, from 1.
    """

    request: int
    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    choice: int = 0
    logprob: float | None = None
    top_logprobs: TopLogProbs = ()
    is_prompt: bool = False
    num_cached_tokens: int = 0
    stop_reason: int | str | None = None
    vocab_rank: int | None = None


@dataclass(frozen=True)
class Completion:
    """One continuation of a request; `prompt_events` only with `echo` or `prompt_logprobs`."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    request: int = 0
    choice: int = 0
    logprobs: tuple[float | None, ...] = ()
    top_logprobs: tuple[TopLogProbs, ...] = ()
    prompt_events: tuple[TokenEvent, ...] = ()


class CompletionBuilder:
    """Collects events into completions."""

    def __init__(self) -> None:
        self._events: dict[tuple[int, int], list[TokenEvent]] = {}
        self._prompts: dict[int, list[TokenEvent]] = {}

    def add(self, event: TokenEvent) -> None:
        """Add the next event."""
        if event.is_prompt:
            self._prompts.setdefault(event.request, []).append(event)
        else:
            self._events.setdefault((event.request, event.choice), []).append(event)

    def completions(self) -> list[Completion]:
        """One completion for each continuation, in the order of requests."""
        return [self._complete(key, events) for key, events in sorted(self._events.items())]

    def _complete(self, key: tuple[int, int], events: list[TokenEvent]) -> Completion:
        request, choice = key
        kept = [event for event in events if event.token is not None]
        return Completion(
            tokens=tuple(event.token for event in kept if event.token is not None),
            text="".join(event.text for event in events),
            finish_reason=events[-1].finish_reason or "length",
            request=request,
            choice=choice,
            logprobs=tuple(event.logprob for event in kept),
            top_logprobs=tuple(event.top_logprobs for event in kept),
            prompt_events=tuple(self._prompts.get(request, ())) if choice == 0 else (),
        )


def check_request(request: Request, config: OPTConfig, what: str = "the prompt") -> None:
    """Raise UserError unless the model can run the request.

    Args:
        what: how the message calls the prompt ("prompt 3").
    """
    length, limit = len(request.prompt), config.max_position_embeddings
    if length == 0:
        raise UserError(f"{what} has no tokens; an OPT sequence begins with {config.bos_token_id}")
    config.check_token_ids(request.prompt, what)
    for name, ids in (
        ("logit_bias", [token for token, _ in request.params.logit_bias]),
        ("stop_token_ids", request.params.stop_token_ids),
        ("allowed_token_ids", request.params.allowed_token_ids),
        ("logprob_token_ids", request.params.logprob_token_ids),
    ):
        foreign = [token for token in ids if not 0 <= token < config.vocab_size]
        if foreign:
            raise UserError(
                f"{what}: {name} has {', '.join(map(str, foreign[:8]))}, but ids go from 0 to {config.vocab_size - 1}"
            )
    if request.params.mark > 0:
        request.params.check_lists(config.vocab_size, f"{what}: ")
    _check_length(length, request.params, limit, what)
    if (request.params.stop or request.params.stop_regex) and request.decoder is None:
        raise UserError(f"{what} has stop strings, which need a tokenizer to be found in the output")
    if request.params.bad_words and not request.params.bad_word_ids:
        raise UserError(f"{what} has bad_words, which need a tokenizer to be turned into ids")


def _check_length(length: int, params: SamplingParams, limit: int, what: str) -> None:
    longest = limit if params.max_new_tokens == 0 else limit - 1  # scoring alone generates nothing
    if length > longest:
        raise UserError(
            f"{what} has {length} tokens with BOS, and the model has {limit} positions: "
            f"shorten it to {longest} or fewer"
        )
    if length + params.max_new_tokens > limit:
        raise UserError(
            f"{what} has {length} tokens with BOS; {params.max_new_tokens} new ones would pass the model's "
            f"{limit} positions: ask for {limit - length} or fewer"
        )
