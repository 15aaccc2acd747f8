"""Printing what the engine generates: text for people, JSON lines for programs, on the leader alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from tqdm import tqdm

from ..generation.request import TokenEvent
from .prompts import Prompt


def show(events: Iterator[TokenEvent], prompts: list[Prompt], *, as_text: bool, as_json: bool, stream: bool) -> None:
    """Print continuations to stdout and, on a terminal, progress to stderr.

    Args:
        as_text: the events carry text; without a tokenizer they do not, and ids are shown instead.

    Results appear in the order of the prompts; with `stream` and JSON, in the order in which they end. On
    ranks that do not lead there are no prompts, and only the events are run through.
    """
    results = [Result(index, prompt) for index, prompt in enumerate(prompts)]
    printer = JSONPrinter(results, stream) if as_json else TextPrinter(results, stream, as_text)
    quiet = not prompts or not sys.stderr.isatty() or (stream and not as_json)
    with tqdm(desc="generating", unit=" tokens", file=sys.stderr, disable=quiet, leave=False) as progress:
        for event in events:
            results[event.request].add(event)
            if event.finish_reason:  # a line may be printed now, and not behind the bar
                progress.clear()
            printer.update(results[event.request], event)
            progress.update()
    sys.stdout.flush()


class Result:
    """What has been generated for one prompt so far."""

    def __init__(self, index: int, prompt: Prompt) -> None:
        self.index = index
        self.prompt = prompt
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Take one more token."""
        self.text += event.text
        self.tokens.append(event.token)
        self.finish_reason = event.finish_reason

    def to_json(self) -> str:
        """The object that --json prints."""
        return json.dumps(
            {
                "index": self.index,
                "prompt": self.prompt.as_given,
                "text": self.text,
                "tokens": self.tokens,
                "finish_reason": self.finish_reason,
            },
            ensure_ascii=False,
        )


class JSONPrinter:
    """One object a line: in order, or with `stream` as they end."""

    def __init__(self, results: list[Result], stream: bool) -> None:
        self._results = results
        self._stream = stream
        self._next = 0

    def update(self, result: Result, event: TokenEvent) -> None:
        """Print what is due."""
        if self._stream:
            if event.finish_reason:
                print(result.to_json(), flush=True)
            return
        while self._next < len(self._results) and self._results[self._next].finish_reason:
            print(self._results[self._next].to_json(), flush=True)
            self._next += 1


class TextPrinter:
    """Prompt and continuation, one prompt after the other; with `stream` the one in front as it grows."""

    def __init__(self, results: list[Result], stream: bool, as_text: bool) -> None:
        self._results = results
        self._stream = stream
        self._as_text = as_text
        self._next = 0
        self._printed: int | None = None  # characters of the result in front; None: not even its prompt

    def update(self, result: Result, event: TokenEvent) -> None:
        """Print what is due."""
        while self._next < len(self._results):
            front = self._results[self._next]
            if not (front.finish_reason or (self._stream and front.tokens)):
                return
            self._print(front)
            if not front.finish_reason:
                return
            self._next, self._printed = self._next + 1, None

    def _print(self, front: Result) -> None:
        if self._printed is None:
            if len(self._results) > 1:
                print(f"{'' if front.index == 0 else chr(10)}=== prompt {front.index + 1} of {len(self._results)} ===")
            prompt = front.prompt.as_given
            print(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)), end="")
            self._printed = 0
        grown = front.text if self._as_text else " " + " ".join(map(str, front.tokens))
        print(grown[self._printed :], end="\n" if front.finish_reason else "", flush=True)
        self._printed = len(grown)
