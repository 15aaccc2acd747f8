"""The engine: one rank leads, the others follow.

    engine = Engine(model, parallel)
    for event in engine.generate(requests): ...        # the same line on every rank

The leader alone reads the requests, chooses tokens and decides what comes next. Before every step it
broadcasts a plan (`plan.py`), which all ranks carry out (`runner.py`); so ranks cannot part, and only the
leader yields events. Requests join the batch as slots become free and leave it when they end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..parallel import ParallelContext, on_all_ranks
from .plan import Kind, PlanChannel, Step
from .request import Completion, FinishReason, Request, TokenEvent, check_request
from .runner import ModelRunner
from .sampling import choose
from .stopping import StopScanner


class Engine:
    """Generates with a model that is spread over the context's ranks.

    Args:
        model: this rank's part (`load_model`).
        max_batch_size: requests that run at the same time; others wait.
        num_tokens: ids from this one on are vocabulary padding and are never chosen; by default the config's.

    Raises:
        UserError: there are more processes than tensor x pipeline ranks.
    """

    def __init__(
        self, model: nn.Module, parallel: ParallelContext, *, max_batch_size: int = 8, num_tokens: int | None = None
    ) -> None:
        if parallel.data_parallel_size != 1:
            raise UserError(
                f"generation runs on tensor x pipeline ranks alone, but {parallel.world_size} processes leave "
                f"{parallel.data_parallel_size} data parallel copies: start fewer processes"
            )
        if max_batch_size < 1:
            raise UserError(f"max_batch_size is {max_batch_size}, but must be at least 1")
        self._parallel = parallel
        self._config = model.opt_config
        self._num_tokens = min(num_tokens or self._config.num_tokens, self._config.num_tokens)
        self._max_batch_size = max_batch_size
        self._runner = ModelRunner(model, parallel)
        self._channel = PlanChannel(parallel)

    def generate(self, requests: Sequence[Request]) -> Iterator[TokenEvent]:
        """Continue all requests; called on every rank, and read to its end there.

        Yields:
            On the leader one event for every token, in the order of generation; on the others nothing.

        Raises:
            UserError: a request cannot be run; raised on the leader, while the others just end.
        """
        if not self._parallel.is_leader:
            self._follow()
            return
        try:
            for index, request in enumerate(requests):
                check_request(request, self._config, f"prompt {index + 1}")
            if requests:
                yield from self._lead([_Sequence(n, r, self._eos(r)) for n, r in enumerate(requests)])
        finally:  # whatever happened, also when the caller stops listening: release the others
            self._channel.send(Kind.STOP, [])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`generate` to the end, and on every rank the list of what came out.

        Raises:
            UserError: a request cannot be run; raised on every rank.
        """
        # The leader may refuse a request; then all raise, and none is left waiting for the result.
        return self._parallel.broadcast_object(on_all_ranks(self._parallel, lambda: self._complete(requests)))

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        tokens: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        reasons: list[FinishReason] = ["length"] * len(requests)
        for event in self.generate(requests):
            tokens[event.request].append(event.token)
            texts[event.request] += event.text
            reasons[event.request] = event.finish_reason or reasons[event.request]
        return [Completion(tuple(t), s, r) for t, s, r in zip(tokens, texts, reasons, strict=True)]

    def _eos(self, request: Request) -> int | None:
        return None if request.params.ignore_eos else self._config.eos_token_id

    def _follow(self) -> None:
        while True:
            kind, numbers = self._channel.receive()
            if kind is Kind.STOP:
                return
            self._runner.do(kind, numbers)

    def _do(self, kind: Kind, numbers: list[int]) -> Tensor | None:
        self._channel.send(kind, numbers)
        return self._runner.do(kind, numbers)

    def _lead(self, sequences: list[_Sequence]) -> Iterator[TokenEvent]:
        slots = min(self._max_batch_size, len(sequences))
        self._do(Kind.ALLOCATE, [slots, max(sequence.final_length for sequence in sequences)])
        waiting, running = deque(sequences), []
        while waiting or running:
            joining = [waiting.popleft() for _ in range(min(slots - len(running), len(waiting)))]
            step = _prefill(joining, len(running)) if joining else _decode(running)
            stepped = joining or running
            running = running + joining
            logits = self._do(Kind.FORWARD, step.to_numbers())
            for sequence, token in zip(stepped, self._choose(stepped, logits), strict=True):
                yield sequence.append(token)
            self._drop_finished(running)

    def _choose(self, sequences: list[_Sequence], logits: Tensor) -> list[int]:
        logits = logits[:, : self._num_tokens]
        if all(sequence.request.params.is_plain_greedy for sequence in sequences):
            return logits.argmax(-1).tolist()
        return [sequence.choose(row) for sequence, row in zip(sequences, logits.cpu(), strict=True)]

    def _drop_finished(self, running: list[_Sequence]) -> None:
        """Remove ended sequences, keeping the others in the first slots."""
        for slot in reversed(range(len(running))):
            if running[slot].is_finished:
                last = running.pop()
                if slot < len(running):
                    self._do(Kind.MOVE, [len(running), slot])
                    running[slot] = last


class _Sequence:
    """A request on its way: what has been generated, and whether it has ended."""

    def __init__(self, index: int, request: Request, eos: int | None) -> None:
        self.index = index
        self.request = request
        self.tokens = list(request.prompt)
        self.is_finished = False
        self._eos = eos
        self._scanner = StopScanner(request.params.stop)
        self._generator = torch.Generator().manual_seed(request.params.seed)

    @property
    def final_length(self) -> int:
        """Tokens that the cache must hold: the last one that is generated is never fed."""
        return len(self.request.prompt) + self.request.params.max_new_tokens - 1

    def choose(self, logits: Tensor) -> int:
        """The next token by this request's own options and generator."""
        return choose(logits, self.request.params, torch.tensor(self.tokens), self._generator)

    def append(self, token: int) -> TokenEvent:
        """Take the chosen token, decide whether it is the last, and say what it adds to the text."""
        self.tokens.append(token)
        generated = len(self.tokens) - len(self.request.prompt)
        reason: FinishReason | None = None
        if generated == self.request.params.max_new_tokens:
            reason = "length"
        if token == self._eos:
            reason = "stop"
        text, stopped = self._text(token, last=reason is not None)
        if stopped:
            reason = "stop"
        self.is_finished = reason is not None
        return TokenEvent(self.index, token, text, reason)

    def _text(self, token: int, *, last: bool) -> tuple[str, bool]:
        decoder = self.request.decoder
        if decoder is None:
            return "", False
        # An end-of-sequence token ends the text; it is no part of it, whatever the decoder makes of it.
        fresh = "" if token == self._eos else decoder.push(token)
        text, stopped = self._scanner.push(fresh + (decoder.flush() if last else ""))
        if last and not stopped:
            text += self._scanner.flush()
        return text, stopped


def _prefill(sequences: list[_Sequence], first_slot: int) -> Step:
    """All prompts in one pass, the shorter ones padded on the right."""
    lengths = [len(sequence.tokens) for sequence in sequences]
    width = max(lengths)
    rows = tuple((*sequence.tokens, *[0] * (width - len(sequence.tokens))) for sequence in sequences)
    return Step(first_slot, (0,) * len(rows), tuple(lengths), rows)


def _decode(sequences: list[_Sequence]) -> Step:
    """Each row's newest token."""
    starts = tuple(len(sequence.tokens) - 1 for sequence in sequences)
    return Step(0, starts, (1,) * len(starts), tuple((sequence.tokens[-1],) for sequence in sequences))
