"""The exceptions for mistakes that a user can correct: the commands print one line and end with exit code 2."""

import sys

_MOST_CHARACTERS = 1500  # of a message


class UserError(ValueError):
    """Bad input. The message says what is wrong, with the numbers, and what to do about it.

    It may quote files and their names, so its text is `printable`.
    """

    def __str__(self) -> str:
        return printable(Exception.__str__(self))


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, incomplete or not what its config says."""


class MissingPackageError(UserError):
    """A package of an extra is not installed.

    Args:
        package: what is missing.
        purpose: what it is needed for, as the message's subject.
        extra: of setup.py, which brings it. The command works for a wheel and for a checkout.
    """

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'opt-megatron[{extra}]'")


class LaunchError(UserError):
    """The ranks were started wrongly, or do not find each other. Each process reports its own error."""


def printable(text: str, limit: int = _MOST_CHARACTERS) -> str:
    """One line of at most `limit` characters: its middle is left out, and control characters are escaped.

    A terminal obeys escape sequences, and characters that are not seen can change what a line seems to say.
    """
    text = _without_middle(text, limit)
    if text.isprintable():
        return text
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return _without_middle("".join(escaped), limit)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - 40) // 2  # so that the result is not cut again
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"


def print_notice(text: str) -> None:
    """Print one line on stderr about something that the user should know."""
    print(f"opt-megatron: {printable(text)}", file=sys.stderr, flush=True)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters of it; its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def shorten(items: list[str], limit: int = 8) -> str:
    """Join names for a message, naming at most `limit` of them and counting the rest."""
    shown = ", ".join(item if item.isprintable() else repr(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
