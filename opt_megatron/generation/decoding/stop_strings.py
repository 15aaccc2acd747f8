"""Stop strings and regular expressions in a stream of text: found across token borders, never shown in part.

The stream ends at the match that is complete first, and of several that are complete at the same character, at the
one that begins first. So the result does not depend on the pieces in which the text arrives: it is the same as if it
arrived one character at a time. For regular expressions this means:

- The first complete match counts, also where more text could make it longer: `\\d+` ends at one digit.
- Conditions on the text after the match (`$`, `\\b`, a negative lookahead) are evaluated at the end of the text so far:
  `foo\\b` matches the first three letters of "food", and `foo\\Bd` matches nothing.
- Conditions on the text before it (`^`, `\\b`, a lookbehind) see the last `CONTEXT` characters that were shown.
- Text is held back as long as it may become a match, so `a.*b` holds back everything after an a.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError
from ..sampling.stop_regex import SEARCH_TIMEOUT_S, compile_stop_regex

CONTEXT = 256

Span = tuple[int, int]


class StopScanner:
    """Passes text on, except what may still become a stop string.

    Args:
        stops: strings, none of them empty.
        patterns: regular expressions, none of which matches the empty string.
        include_stop: pass the match on too.

    Attributes:
        match: the text that ended the stream.

    Raises:
        UserError: a pattern cannot be used, or takes too long (from `push`).
    """

    def __init__(self, stops: Sequence[str], patterns: Sequence[str] = (), include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._patterns = [compile_stop_regex(pattern) for pattern in patterns]
        self._include_stop = include_stop
        self.match: str | None = None
        self._reset()

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Add text.

        Args:
            may_stop: without it, a match that is complete with this text does not end the stream; one that begins here
                and is complete later may.

        Returns:
            the text that can be shown now, and whether a match ends the stream (text before it is still shown).
        """
        known = len(self._text)
        self._text += text
        if not may_stop:
            self._pass_over(known)
        elif match := self._find(known):
            start, end = match
            self.match = self._text[start:end]
            shown = self._text[self._shown : end if self._include_stop else start]
            self._reset()
            return shown, True
        return self._release(min([len(self._text) - self._possible_start(), *self._begins])), False

    def flush(self) -> str:
        """The text that was held back, once no more follows that could make it a stop string."""
        text = self._text[self._shown :]
        self._reset()
        return text

    def _reset(self) -> None:
        self._text = ""  # the last characters shown, for context, and those held back
        self._shown = 0  # where those held back begin
        self._begins = [0] * len(self._patterns)  # where each pattern's match could begin

    def _release(self, end: int) -> str:
        """Show the text up to `end`."""
        shown = self._text[self._shown : end]
        dropped = max(end - CONTEXT, 0)
        self._text = self._text[dropped:]
        self._shown = end - dropped
        self._begins = [begin - dropped for begin in self._begins]
        return shown

    def _find(self, known: int) -> Span | None:
        """The match that is complete first, the text up to `known` having been searched."""
        spans = []
        for stop in self._stops:
            start = self._text.find(stop, max(self._shown, known - len(stop) + 1))
            if start >= 0:
                spans.append((start, start + len(stop)))
        first_end = min((end for _, end in spans), default=len(self._text))
        for end in range(known + 1, first_end + 1 if self._patterns else 0):
            matches = [span for index in range(len(self._patterns)) if (span := self._search(index, end))]
            if matches:
                return min(matches + [span for span in spans if span[1] == end])
        return min((span for span in spans if span[1] == first_end), default=None)

    def _pass_over(self, known: int) -> None:
        """Note where text from `known` on could begin a match that is complete later; ignore complete ones."""
        for end in range(known + 1, len(self._text) + 1):
            for index in range(len(self._patterns)):
                while span := self._search(index, end):
                    self._begins[index] = span[0] + 1

    def _search(self, index: int, end: int) -> Span | None:
        """A pattern's match in the text up to `end`; without one, remember where it could begin."""
        pattern, begin = self._patterns[index], self._begins[index]
        try:
            match = pattern.search(self._text, begin, end, partial=True, timeout=SEARCH_TIMEOUT_S)
        except TimeoutError:
            raise UserError(
                f"stop_regex {pattern.pattern!r} took more than {SEARCH_TIMEOUT_S:g} s for one search: "
                "write it without repetitions inside repetitions"
            ) from None
        if match and not match.partial:
            return match.span()
        self._begins[index] = match.start() if match else end
        return None

    def _possible_start(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._text) - self._shown), 0, -1):
            end = self._text[len(self._text) - size :]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
