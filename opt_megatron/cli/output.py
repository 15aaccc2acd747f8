"""Prints what the engine generates, on the leader: text, or a JSON object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from ..files import progress_bar
from ..generation.request import Request, TextDecoder, TokenEvent
from .prompts import Prompt


def print_events(
    events: Iterator[TokenEvent], prompts: list[Prompt], requests: list[Request], as_json: bool, stream: bool
) -> None:
    """Print continuations to stdout and, on a terminal, progress to stderr.

    They are printed in the order of the prompts; with `stream` and JSON, in the order in which they end. On other
    ranks than the leader there are no prompts and no events, and the engine's steps are run by iterating.
    """
    results = {
        (index, choice): Continuation(index, choice, prompt, request)
        for index, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        for choice in range(request.params.n)
    }
    ordered = list(results.values())
    printer = JSONPrinter(ordered, stream) if as_json else TextPrinter(ordered, stream)
    hidden = not prompts or (stream and not as_json)
    with progress_bar("generating", unit=" tokens", hidden=hidden) as progress:
        for event in events:
            result = results[event.request, event.choice]
            result.add(event)
            if event.finish_reason:  # a line may be printed now, and must not follow the bar
                progress.clear()
            printer.update(result, event)
            progress.update()
    sys.stdout.flush()


class Continuation:
    """What has been generated so far for one continuation of a prompt."""

    def __init__(self, index: int, choice: int, prompt: Prompt, request: Request) -> None:
        self.index, self.choice = index, choice
        self.prompt = prompt
        self.num_choices = request.params.n
        self.has_text = request.decoder is not None  # without a tokenizer, ids are shown instead
        self._decoder = request.decoder
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._reports_logprobs = request.params.logprobs is not None
        self._reports_prompt = request.params.num_prompt_logprobs is not None and choice == 0
        self._reports_prompt_logprobs = self._reports_logprobs or request.params.prompt_logprobs is not None
        self._events: list[TokenEvent] = []
        self._prompt_events: list[TokenEvent] = []

    def add(self, event: TokenEvent) -> None:
        """Append one event's token and text."""
        self.finish_reason = event.finish_reason
        if event.is_prompt:
            self._prompt_events.append(event)
            return
        self.text += event.text
        if event.token is not None:  # None belongs to a queue's requests that were cancelled or failed
            self.tokens.append(event.token)
            if self._reports_logprobs:
                self._events.append(event)

    def to_json(self) -> str:
        """The JSON object that --json prints."""
        shown: dict[str, Any] = {"index": self.index}
        if self.num_choices > 1:
            shown["choice"] = self.choice
        shown |= {
            "prompt": self.prompt.as_given,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }
        if self._reports_logprobs:
            shown |= _log_probabilities(self._events, "")
        if self._reports_prompt:
            shown["prompt_tokens"] = [event.token for event in self._prompt_events]
            if self._reports_prompt_logprobs:
                shown |= _log_probabilities(self._prompt_events, "prompt_")
        return json.dumps(shown, ensure_ascii=False)

    def log_probability_lines(self) -> str:
        """A line for each token, with those that were likelier or next; nothing where no log-probabilities are."""
        return "".join(
            f"{_rounded(event.logprob)}  {self._shown(event.token)}"
            + "".join(f"   {_rounded(logprob)} {self._shown(token)}" for token, logprob in event.top_logprobs)
            + "\n"
            for event in self._prompt_events * self._reports_prompt_logprobs + self._events
        )

    def _shown(self, token: int | None) -> str:
        """The text of a token as a Python string, or its id where there is no tokenizer."""
        return str(token) if token is None or self._decoder is None else repr(_text_of(self._decoder(), token))


def _text_of(decoder: TextDecoder, token: int) -> str:
    return decoder.push(token) + decoder.flush()


def _rounded(logprob: float | None) -> str:
    return f"{'-' if logprob is None else format(logprob, '.3f'):>8}"


def _log_probabilities(events: list[TokenEvent], prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}logprobs": [event.logprob for event in events],
        f"{prefix}top_logprobs": [[list(pair) for pair in event.top_logprobs] for event in events],
    }


class JSONPrinter:
    """Prints one object a line: in order, or with `stream` as continuations end."""

    def __init__(self, results: list[Continuation], stream: bool) -> None:
        self._results = results
        self._stream = stream
        self._next = 0

    def update(self, result: Continuation, event: TokenEvent) -> None:
        """Print what can be printed after the event."""
        if self._stream:
            if event.finish_reason:
                print(result.to_json(), flush=True)
            return
        while self._next < len(self._results) and self._results[self._next].finish_reason:
            print(self._results[self._next].to_json(), flush=True)
            self._next += 1


class TextPrinter:
    """Prints prompts with their continuations, in order; with `stream` the first unfinished one as it grows."""

    def __init__(self, results: list[Continuation], stream: bool) -> None:
        self._results = results
        self._stream = stream
        self._num_prompts = len({result.index for result in results})
        self._next = 0
        self._printed: int | None = None  # characters of the first unfinished one; None: not even its prompt

    def update(self, result: Continuation, event: TokenEvent) -> None:
        """Print what can be printed after the event."""
        while self._next < len(self._results):
            current = self._results[self._next]
            if not (current.finish_reason or (self._stream and current.tokens)):
                return
            self._print(current)
            if not current.finish_reason:
                return
            self._next, self._printed = self._next + 1, None

    def _print(self, current: Continuation) -> None:
        if self._printed is None:
            if len(self._results) > 1:
                print(f"{'' if current is self._results[0] else chr(10)}=== {self._title(current)} ===")
            prompt = current.prompt.as_given
            print(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)), end="")
            self._printed = 0
        grown = current.text if current.has_text else "".join(f" {token}" for token in current.tokens)
        print(grown[self._printed :], end="\n" if current.finish_reason else "", flush=True)
        self._printed = len(grown)
        if current.finish_reason:
            print(current.log_probability_lines(), end="", flush=True)

    def _title(self, current: Continuation) -> str:
        parts = [("prompt", current.index, self._num_prompts), ("continuation", current.choice, current.num_choices)]
        return ", ".join(f"{name} {number + 1} of {count}" for name, number, count in parts if count > 1)
