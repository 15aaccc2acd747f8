"""From a continuation's tokens to the text of its events, and the reason why it ends."""

from __future__ import annotations

from collections.abc import Sequence

from ..request import FinishReason, Request
from .stop_strings import StopScanner


class IncrementalDetokenizer:
    """Turns the tokens of one continuation into text, and detects its end.

    Args:
        eos: ids that end it, besides the request's own.

    Attributes:
        stop_reason: see `TokenEvent`.
    """

    def __init__(self, request: Request, eos: Sequence[int]) -> None:
        params = request.params
        self._num_tokens = 0
        self._min_new_tokens, self._max_new_tokens = params.min_new_tokens, params.max_new_tokens
        self._eos = frozenset(eos)
        self._end_tokens = {*params.stop_token_ids, *eos}
        self.stop_reason: int | str | None = None
        self._decoder = request.make_decoder()
        has_stops = bool(params.stop or params.stop_regex)
        self._scanner = StopScanner(params.stop, params.stop_regex, params.include_stop) if has_stops else None

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Add the next token.

        Returns:
            the text that it adds, and the reason why it is the last one, if it is.
        """
        self._num_tokens += 1
        reason: FinishReason | None = None
        if self._num_tokens == self._max_new_tokens:
            reason = "length"
        if token in self._end_tokens:
            reason = "stop"
            self.stop_reason = None if token in self._eos else token
        if self._decoder is None:
            return "", reason
        # A token that ends the text is not part of it, whatever its text.
        text = "" if token in self._end_tokens else self._decoder.push(token)
        if reason is not None:
            text += self._decoder.flush()
        if self._scanner is None:
            return text, reason
        text, is_stopped = self._scanner.push(text, may_stop=self._num_tokens > self._min_new_tokens)
        if is_stopped:
            self.stop_reason = self._scanner.match
            return text, "stop"
        return text + self._scanner.flush() if reason is not None else text, reason
