"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..config import OPTConfig
from ..errors import UserError
from .sampling import SamplingParams

FinishReason = Literal["stop", "length"]


class TextDecoder(Protocol):
    """Turns ids into text one at a time (the tokenizer's StreamDecoder, for one)."""

    def push(self, token: int) -> str:
        """Text that is complete once `token` has arrived."""

    def flush(self) -> str:
        """Text that was held back."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, BOS included, as they are fed to the model.
        decoder: makes the events' text; without one, text is empty and stop strings cannot be used.
    """

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    decoder: TextDecoder | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Attributes:
        request: index of the request in the order given to `generate`.
        token: its id; an end-of-sequence token is reported too.
        text: what this token adds to the text, possibly nothing (half a character, the start of a stop string).
        finish_reason: "stop" or "length" on the request's last event, else None.
    """

    request: int
    token: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """All that was generated for one request."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def check_request(request: Request, config: OPTConfig, what: str = "the prompt") -> None:
    """Raise UserError unless the model can run the request.

    Args:
        what: how the message calls the prompt ("prompt 3").
    """
    length, limit = len(request.prompt), config.max_position_embeddings
    if length == 0:
        raise UserError(f"{what} has no tokens; an OPT sequence begins with {config.bos_token_id}")
    strange = [token for token in request.prompt if not 0 <= token < config.vocab_size]
    if strange:
        raise UserError(f"{what} holds the id {strange[0]}, but ids go from 0 to {config.vocab_size - 1}")
    if length >= limit:
        raise UserError(
            f"{what} has {length} tokens with BOS, and the model has {limit} positions: "
            f"shorten it to {limit - 1} or fewer"
        )
    if length + request.params.max_new_tokens > limit:
        raise UserError(
            f"{what} has {length} tokens with BOS; {request.params.max_new_tokens} new ones would pass the model's "
            f"{limit} positions: ask for {limit - length} or fewer"
        )
    if request.params.stop and request.decoder is None:
        raise UserError(f"{what} has stop strings, which need a tokenizer to be found in the output")
