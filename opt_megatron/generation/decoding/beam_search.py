"""Beam search: the likeliest continuations instead of sampled ones.

The rules are those of transformers (generation/utils.py, `_beam_search`), so that results are equal: of the
candidates (1 + ends) x beams are looked at, those that end and are among the best `num_beams` are finished
with the score sum / length**length_penalty, and the search stops when no running beam can do better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ..core.kv_cache_allocator import common_prefix
from ..request import Request, TokenEvent
from ..sampling.sampler import SamplingParams, TokenHistory, filtered_scores
from .detokenizer import Continuation
from .sequences import Branch, CachedSequence, Copy, Feed


class Beam(NamedTuple):
    """A running or finished hypothesis: generated tokens, and the sum of their log-probabilities or its score."""

    score: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Continued:
    """A beam that goes on: which of the running ones, and with what token."""

    parent: int
    token: int


class BeamSearch:
    """The search for one prompt; knows scores and tokens, no model and no text.

    Args:
        ends: ids that end a beam.
    """

    def __init__(self, params: SamplingParams, ends: Sequence[int]) -> None:
        self._params = params
        self._ends = set(ends)
        self._candidates = max(2, 1 + len(self._ends)) * params.num_beams
        self.running = [Beam(0.0, ())]
        self._finished: list[Beam] = []
        self.is_done = False

    def advance(self, scores: Tensor) -> list[Continued]:
        """One step.

        Args:
            scores: [running beams, vocabulary], log-probabilities after all filters.

        Returns:
            the next running beams, best first.
        """
        sums = scores + torch.tensor([beam.score for beam in self.running])[:, None]
        values, indices = sums.flatten().topk(min(self._candidates, sums.numel()))
        candidates = [
            (value, Continued(index // scores.size(1), index % scores.size(1)))
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
        length = len(self.running[0].tokens) + 1
        at_end = length == self._params.max_new_tokens
        for value, step in candidates[: self._params.num_beams]:
            if (at_end or step.token in self._ends) and value > -math.inf:
                self._finished.append(self._finish(value, (*self.running[step.parent].tokens, step.token)))
        # All that end in this step are compared; sorting is stable: the earlier one wins a tie.
        self._finished = sorted(self._finished, key=lambda beam: -beam.score)[: self._params.num_beams]
        going = [(v, s) for v, s in candidates if not at_end and s.token not in self._ends and v > -math.inf]
        going = going[: self._params.num_beams]
        self.running = [Beam(v, (*self.running[s.parent].tokens, s.token)) for v, s in going]
        self.is_done = not going or not self._can_improve(length)
        return [step for _, step in going]

    def _finish(self, total: float, tokens: tuple[int, ...]) -> Beam:
        return Beam(total / len(tokens) ** self._params.length_penalty, tokens)

    @property
    def _is_full(self) -> bool:
        return len(self._finished) == self._params.num_beams

    def _can_improve(self, length: int) -> bool:
        if not self._is_full:
            return True
        if self._params.early_stopping:
            return False
        return self.running[0].score / length**self._params.length_penalty > self._finished[-1].score

    def best(self) -> list[Beam]:
        """The `n` best finished beams, best first."""
        return self._finished[: self._params.n]


class BeamBranch(Branch):
    """A request under beam search; its events come when the search has ended."""

    def __init__(self, number: int, request: Request, eos: int | None) -> None:
        params = request.params
        size = len(request.prompt) + params.max_new_tokens - 1
        super().__init__(number, request, 0, params.num_beams, size)
        self._eos = eos
        self._prompt_history = TokenHistory(request.prompt, eos)
        self._search = BeamSearch(params, [*params.stop_token_ids, *(() if eos is None else (eos,))])
        self._active = 1  # sequences that hold running beams

    def feeds(self, budget: int) -> list[Feed]:
        """A piece of the prompt, or every running beam's newest token."""
        if self.is_prefilling:
            count = min(self.lead.pending, budget)
            return [Feed(self.lead, count, int(count == self.lead.pending))] if count else []
        return [Feed(sequence, 1, 1) for sequence in self.sequences[: self._active]]

    def take(self, feeds: Sequence[Feed], outputs: Sequence[Tensor], copy: Copy) -> list[TokenEvent]:
        """Search one step further."""
        for feed in feeds:
            feed.sequence.cached += feed.count
        if self.lead.pending:
            return []
        rows = torch.cat(list(outputs)).cpu().log_softmax(-1)
        scores = torch.stack([self._filtered(row, feed.sequence) for row, feed in zip(rows, feeds, strict=True)])
        steps = self._search.advance(scores)
        if self._search.is_done:
            if len(self._search.best()) < self.request.params.n:
                raise UserError(
                    f"the beam search found {len(self._search.best())} continuations and n is {self.request.params.n}: "
                    "options leave too few tokens possible"
                )
            self.is_finished = True
            return self._report()
        self._rearrange(steps, copy)
        return []

    def _filtered(self, scores: Tensor, sequence: CachedSequence) -> Tensor:
        history = self._prompt_history.copy()
        for token in sequence.tokens[len(self.request.prompt) :]:
            history.append(token)
        return filtered_scores(scores, self.request.params, history)

    def _rearrange(self, steps: list[Continued], copy: Copy) -> None:
        """Give every beam a sequence whose cache holds its tokens but the last.

        A beam's first child stays where it is; the others take sequences that have no child of their own, and
        copy what they do not have in common.
        """
        parents = [(list(sequence.tokens), sequence) for sequence in self.sequences]
        taken: dict[int, CachedSequence] = {}
        for index, step in enumerate(steps):
            sequence = parents[step.parent][1]
            if sequence not in taken.values():
                taken[index] = sequence
        free = [sequence for sequence in self.sequences if sequence not in taken.values()]
        for index, step in enumerate(steps):
            tokens, source = parents[step.parent]
            if index not in taken:
                target = taken[index] = free.pop(0)
                copy(source, target, common_prefix(target.tokens[: target.cached], tokens), len(tokens))
        for index, step in enumerate(steps):
            sequence, tokens = taken[index], parents[step.parent][0]
            sequence.tokens, sequence.cached = [*tokens, step.token], len(tokens)
        chosen = [taken[index] for index in range(len(steps))]
        self.sequences = chosen + [sequence for sequence in self.sequences if sequence not in chosen]
        self._active = len(chosen)

    def cancelled(self) -> list[TokenEvent]:
        """End now."""
        (event,) = super().cancelled()
        return [replace(event, choice=choice) for choice in range(self.request.params.n)]

    def _report(self) -> list[TokenEvent]:
        events = []
        for choice, beam in enumerate(self._search.best()):
            continuation = Continuation(self.request, self._eos, choice)
            for index, token in enumerate(beam.tokens):
                text, reason = continuation.push(token)
                is_last = index == len(beam.tokens) - 1
                events.append(TokenEvent(self.number, token, text, reason or ("stop" if is_last else None), choice))
                if reason:
                    break
        return events
