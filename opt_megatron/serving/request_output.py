"""`OutputCollector`: the engine's events for the prompts of one HTTP request, in the order in which they happen."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ..generation.request import TokenEvent
from .errors import ApiError


class PromptEvent(NamedTuple):
    """An event of one of the prompts of an HTTP request.

    Attributes:
        prompt_index: the prompt's position in the HTTP request, from 0.
    """

    prompt_index: int
    event: TokenEvent


class OutputCollector:
    """Collects the events of several engine requests for one reader.

    Args:
        cancel: cancels an engine request, by its number.
    """

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self._prompt_index: dict[int, int] = {}  # number of an unfinished engine request -> index of its prompt
        self._events: deque[PromptEvent] = deque()
        self._changed = asyncio.Event()
        self._error: ApiError | None = None

    def add_request(self, number: int, prompt_index: int) -> None:
        """Expect events of the engine request `number`, which continues the prompt `prompt_index`."""
        self._prompt_index[number] = prompt_index

    def add_event(self, number: int, event: TokenEvent, is_last: bool) -> None:
        """Append an event of the engine request `number`."""
        prompt_index = self._prompt_index[number]
        if is_last:
            del self._prompt_index[number]
        self._events.append(PromptEvent(prompt_index, event))
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """Let the reader get `error` after the events that are here already."""
        self._error = self._error or error
        self._changed.set()

    def cancel(self) -> None:
        """Cancel the engine requests that have not finished."""
        for number in list(self._prompt_index):
            self._cancel(number)

    async def next_events(self) -> list[PromptEvent]:
        """Wait until there are events.

        Returns:
            All events since the last call; an empty list when every engine request has finished.

        Raises:
            ApiError: as given to `fail`.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self._prompt_index:
                return []
            self._changed.clear()
            await self._changed.wait()
        events = list(self._events)
        self._events.clear()
        return events
