"""The exceptions for mistakes that a user can correct: the commands print one line and end with exit code 2."""


class UserError(ValueError):
    """Bad input. The message says what is wrong, with the numbers, and what to do about it."""


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


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's message, at most `limit` characters of it; its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def shorten(items: list[str], limit: int = 8) -> str:
    """Join names for a message, naming at most `limit` of them and counting the rest."""
    shown = ", ".join(item if item.isprintable() else repr(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
