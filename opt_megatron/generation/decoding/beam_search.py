"""Beam search: the likeliest continuations instead of sampled ones.

The rules are those of transformers (generation/utils.py, `_beam_search`), so that results are equal: the best
(1 + end tokens) x beams candidates are considered, those that end and are among the best `num_beams` are finished
with the score sum / length**length_penalty, and the search stops when no running beam can do better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from ..request import Request, TokenEvent
from ..sampling.logits_processors import NO_IDS, ProcessorChain
from ..sampling.sampler import filtered_scores
from ..sampling.sampling_params import SamplingParams
from ..sampling.token_history import TokenHistory
from ..step import ScheduledSequence
from .detokenizer import IncrementalDetokenizer
from .sequences import CachedSequence, CopyCache, SequenceGroup, common_prefix_length


class Beam(NamedTuple):
    """A running or finished hypothesis: generated tokens, and the sum of their log-probabilities or its score."""

    score: float
    tokens: tuple[int, ...]


class Candidate(NamedTuple):
    """A continuation of a beam: the index of the running beam, and the next token."""

    parent: int
    token: int


class BeamSearch:
    """The search for one prompt, in terms of scores and tokens; independent of the model and of text.

    Args:
        end_tokens: ids that end a beam.

    Attributes:
        running: the beams that continue, best first.
        is_done: no running beam can become better than the finished ones.
    """

    def __init__(self, params: SamplingParams, end_tokens: Sequence[int]) -> None:
        self._params = params
        self._end_tokens = set(end_tokens)
        self._num_candidates = max(2, 1 + len(self._end_tokens)) * params.num_beams
        self.running = [Beam(0.0, ())]
        self._finished: list[Beam] = []
        self.is_done = False

    def advance(self, scores: Tensor) -> list[Candidate]:
        """Extend every running beam by a token.

        Args:
            scores: [running beams, vocabulary], log-probabilities after all processors.

        Returns:
            how the next running beams continue the present ones, best first.
        """
        sums = scores + torch.tensor([beam.score for beam in self.running])[:, None]
        values, indices = sums.flatten().topk(min(self._num_candidates, sums.numel()))
        candidates = [
            (value, Candidate(index // scores.size(1), index % scores.size(1)))
            for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        ]
        length = len(self.running[0].tokens) + 1
        at_end = length == self._params.max_new_tokens
        for value, candidate in candidates[: self._params.num_beams]:
            if (at_end or candidate.token in self._end_tokens) and value > -math.inf:
                self._finished.append(self._finish(value, (*self.running[candidate.parent].tokens, candidate.token)))
        # All that end in this step are compared; sorting is stable: the earlier one wins a tie.
        self._finished = sorted(self._finished, key=lambda beam: -beam.score)[: self._params.num_beams]
        kept = [(v, c) for v, c in candidates if not at_end and c.token not in self._end_tokens and v > -math.inf]
        kept = kept[: self._params.num_beams]
        self.running = [Beam(v, (*self.running[c.parent].tokens, c.token)) for v, c in kept]
        self.is_done = not kept or not self._can_improve(length)
        return [candidate for _, candidate in kept]

    def _finish(self, logprob_sum: float, tokens: tuple[int, ...]) -> Beam:
        return Beam(logprob_sum / len(tokens) ** self._params.length_penalty, tokens)

    @property
    def _is_full(self) -> bool:
        return len(self._finished) == self._params.num_beams

    def _can_improve(self, length: int) -> bool:
        """The stopping rule: whether the best running beam, of `length` tokens, could still replace a finished one."""
        if not self._is_full:
            return True
        if self._params.early_stopping:
            return False
        return self.running[0].score / length**self._params.length_penalty > self._finished[-1].score

    def best(self) -> list[Beam]:
        """The `n` best finished beams, best first."""
        return self._finished[: self._params.n]


class BeamSearchGroup(SequenceGroup):
    """A request under beam search; its events come when the search has ended."""

    def __init__(self, request_id: int, request: Request, eos: Sequence[int], suppressed: Tensor = NO_IDS) -> None:
        params = request.params
        max_length = len(request.prompt) + params.max_new_tokens - 1
        super().__init__(request_id, request, 0, params.num_beams, max_length)
        self._eos = eos
        self._chain = ProcessorChain(params, suppressed)
        self._prompt_history = TokenHistory(request.prompt, eos)
        self._search = BeamSearch(params, [*params.stop_token_ids, *eos])
        self._num_running = 1  # the first ones of `sequences`, which hold the running beams

    def schedule(self, budget: int) -> list[ScheduledSequence]:
        """A piece of the prompt, or every running beam's newest token."""
        if self.lead.is_prefilling:
            count = min(self.lead.num_pending, budget)
            return [self.lead.schedule(count, int(count == self.lead.num_pending))] if count else []
        return [sequence.schedule(1, 1) for sequence in self.sequences[: self._num_running]]

    def process_outputs(
        self, scheduled: Sequence[ScheduledSequence], outputs: Sequence[Tensor], copy: CopyCache
    ) -> list[TokenEvent]:
        """Advance the search by one step."""
        running = self.sequences[: len(scheduled)]
        if self.lead.num_pending:
            return []
        rows = torch.cat(list(outputs)).log_softmax(-1)
        scores = torch.stack([self._filtered(row, sequence) for row, sequence in zip(rows, running, strict=True)])
        candidates = self._search.advance(scores)
        if not self._search.is_done:
            self._assign_sequences(candidates, copy)
            return []
        if len(self._search.best()) < self.request.params.n:
            raise UserError(
                f"the beam search found {len(self._search.best())} continuations and n is {self.request.params.n}: "
                "options leave too few tokens possible"
            )
        self.is_finished = True
        return self._final_events()

    def _filtered(self, scores: Tensor, sequence: CachedSequence) -> Tensor:
        history = self._prompt_history.copy()
        history.tokens += sequence.tokens[len(self.request.prompt) :]
        return filtered_scores(scores, self._chain, history)

    def _assign_sequences(self, candidates: list[Candidate], copy: CopyCache) -> None:
        """Give every beam a sequence whose cache holds its tokens but the last.

        A beam's first child keeps its sequence; the others get sequences whose beam has no child, and copy the tokens
        that the two do not have in common.
        """
        parents = [(list(sequence.tokens), sequence) for sequence in self.sequences]
        assigned: dict[int, CachedSequence] = {}
        for index, candidate in enumerate(candidates):
            sequence = parents[candidate.parent][1]
            if sequence not in assigned.values():
                assigned[index] = sequence
        free = [sequence for sequence in self.sequences if sequence not in assigned.values()]
        for index, candidate in enumerate(candidates):
            tokens, source = parents[candidate.parent]
            if index not in assigned:
                target = assigned[index] = free.pop(0)
                begin = common_prefix_length(target.tokens[: target.num_cached], tokens)
                copy(source, target, begin, len(tokens))
        for index, candidate in enumerate(candidates):
            sequence, tokens = assigned[index], parents[candidate.parent][0]
            sequence.tokens, sequence.num_cached = [*tokens, candidate.token], len(tokens)
        running = [assigned[index] for index in range(len(candidates))]
        self.sequences = running + [sequence for sequence in self.sequences if sequence not in running]
        self.lead = self.sequences[0]
        self._num_running = len(running)

    def cancel(self) -> list[TokenEvent]:
        """End the group, and return the last event of each of its continuations."""
        (event,) = super().cancel()
        return [replace(event, choice=choice) for choice in range(self.request.params.n)]

    def _final_events(self) -> list[TokenEvent]:
        events = []
        for choice, beam in enumerate(self._search.best()):
            detokenizer = IncrementalDetokenizer(self.request, self._eos)
            for index, token in enumerate(beam.tokens):
                text, reason = detokenizer.push(token)
                is_last = index == len(beam.tokens) - 1
                reason = reason or ("stop" if is_last else None)
                event = TokenEvent(
                    self.request_id,
                    token,
                    text,
                    reason,
                    choice,
                    num_cached_tokens=self.num_shared_tokens,
                    stop_reason=detokenizer.stop_reason,
                )
                events.append(event)
                if reason:
                    break
        return events
