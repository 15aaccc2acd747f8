"""Which regular expressions can end a stream of text (`stop_regex`)."""

from __future__ import annotations

import regex

from ...errors import UserError

SEARCH_TIMEOUT_S = 1.0  # for one search, which takes microseconds unless the pattern backtracks without end
_MOVES_START = regex.compile(r"(?<!\\)(?:\\\\)*\\K")


def compile_stop_regex(pattern: str) -> regex.Pattern:
    """Compile a regular expression that can end a stream.

    Raises:
        UserError: it is not a regular expression, or not one that can end a stream.
    """
    try:
        compiled = regex.compile(pattern)
        empty = compiled.search("", timeout=SEARCH_TIMEOUT_S)
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise UserError(f"stop_regex {pattern!r} is not a regular expression: {error}") from error
    if empty:
        raise UserError(f"stop_regex {pattern!r} matches the empty string, so nothing would be generated")
    if compiled.flags & regex.REVERSE:
        raise UserError(f"stop_regex {pattern!r} searches backwards, which a stream cannot: leave out (?r)")
    if _MOVES_START.search(pattern):  # the text before \K would be shown before the match is complete
        raise UserError(f"stop_regex {pattern!r} moves the start of the match: write a lookbehind instead of \\K")
    return compiled
