"""From a continuation's tokens to the events' text and the reason why it ends."""

from __future__ import annotations

from ..request import FinishReason, Request
from .stop_strings import StopScanner


class Continuation:
    """What a continuation says so far, and whether it has ended.

    Args:
        eos: the id that ends it, or None.
        choice: which of the request's continuations.
    """

    def __init__(self, request: Request, eos: int | None, choice: int = 0) -> None:
        params = request.params
        self.choice = choice
        self.count = 0
        self._params = params
        self._ends = {*params.stop_token_ids, *(() if eos is None else (eos,))}
        self._decoder = request.decoder() if request.decoder else None
        self._scanner = StopScanner(params.stop, params.stop_regex, params.include_stop)

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Take the next token: the text that it adds, and why it is the last one, if it is."""
        self.count += 1
        reason: FinishReason | None = None
        if self.count == self._params.max_new_tokens:
            reason = "length"
        if token in self._ends:
            reason = "stop"
        text, stopped = self._text(token, last=reason is not None)
        return text, "stop" if stopped else reason

    def _text(self, token: int, *, last: bool) -> tuple[str, bool]:
        if self._decoder is None:
            return "", False
        # A token that ends the text is no part of it, whatever the decoder makes of it.
        fresh = "" if token in self._ends else self._decoder.push(token)
        text, stopped = self._scanner.push(fresh + (self._decoder.flush() if last else ""))
        if last and not stopped:
            text += self._scanner.flush()
        return text, stopped
