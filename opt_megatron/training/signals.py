"""Signals that end a run after the step that is being computed."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class SignalFlag:
    """Truthy once the signal has arrived, which then does not end the process. Use as a context manager.

    Where handlers cannot be set, outside the main thread, the flag stays false.
    """

    def __init__(self, number: signal.Signals) -> None:
        self._number, self._arrived = number, False
        self._former_handler: Any = None

    def __enter__(self) -> SignalFlag:
        try:
            self._former_handler = signal.signal(self._number, self._handle)
        except ValueError:  # not in the main thread
            self._former_handler = None
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._arrived = True

    def __bool__(self) -> bool:
        return self._arrived

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former_handler is not None:
            # The process is about to end because of the signal: a second one must not interrupt that.
            signal.signal(self._number, signal.SIG_IGN if self._arrived else self._former_handler)
