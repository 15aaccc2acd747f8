"""Drafts, which propose tokens for speculative decoding (`speculative.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..sampling.random_numbers import Purpose
from ..sampling.sampler import distribution, sample_token
from ..step import ScheduledSequence, StepInput, StepOutput
from .sampling_group import SamplingGroup
from .speculative import Proposal

_MAX_NGRAM = 3


class Draft(Protocol):
    """The interface of a draft: it proposes the next tokens of several sequences."""

    def propose(self, groups: Sequence[SamplingGroup]) -> None:
        """Set each group's `proposal`, of at most its `max_proposed_tokens`."""


class PromptLookup:
    """Proposes what followed the previous occurrence of the newest tokens in the sequence.

    (Saxena 2023, "Prompt Lookup Decoding".) It needs no model, and helps where the text repeats its prompt.

    Args:
        num_tokens: proposed at a time.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._indices: dict[SamplingGroup, _NGramIndex] = {}

    def propose(self, groups: Sequence[SamplingGroup]) -> None:
        """Look up each group's newest three tokens, or else two."""
        self._indices = {group: self._indices.get(group) or _NGramIndex() for group in groups}
        for group, index in self._indices.items():
            count = min(self._num_tokens, group.max_proposed_tokens)
            tokens = index.after_last(group.lead.tokens)[:count]
            group.proposal = Proposal(tokens, [None] * len(tokens))


class _NGramIndex:
    """Where each pair and triple of a growing sequence last ended."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def after_last(self, tokens: list[int]) -> list[int]:
        """What followed the latest earlier occurrence of the newest tokens."""
        # N-grams that end with the newest token are added in the next call.
        for end in range(max(2, self._num_indexed), len(tokens)):
            for size in range(2, min(_MAX_NGRAM, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)
        for size in range(_MAX_NGRAM, 1, -1):
            found = self._ends.get(tuple(tokens[-size:]))
            if found is not None:
                return tokens[found:]
        return []


class DraftModel:
    """A smaller model with its own cache, in which every sequence has the same blocks as in the model's.

    Args:
        forward: runs a step of the draft model on all ranks; the leader gets the output.
        num_tokens: proposed at a time.
    """

    def __init__(self, forward: Callable[[StepInput], StepOutput], num_tokens: int) -> None:
        self._forward = forward
        self._num_tokens = num_tokens

    def propose(self, groups: Sequence[SamplingGroup]) -> None:
        """Choose tokens from the draft model as the requests' options choose them from the model, for all groups
        together."""
        for group in groups:
            group.proposal = Proposal()
        for index in range(self._num_tokens):
            active = [group for group in groups if group.max_proposed_tokens > index]
            if not active:
                return
            self._propose_one(active)

    def _propose_one(self, groups: list[SamplingGroup]) -> None:
        sequences = tuple(self._schedule(group) for group in groups)
        output = self._forward(StepInput(sequences))
        tokens, rows = iter(output.tokens.tolist()), iter(output.rows.cpu())
        for group, scheduled in zip(groups, sequences, strict=True):
            group.lead.num_draft_cached = scheduled.position + len(scheduled.tokens)
            token, source = self._sample(group, next(rows)) if group.sampling is None else (next(tokens), None)
            group.proposal.tokens.append(token)
            group.proposal.distributions.append(source)

    @staticmethod
    def _sample(group: SamplingGroup, logits: Tensor) -> tuple[int, Tensor]:
        chain, history, numbers = group.sampler_state
        history = history.copy()
        for proposed in group.proposal.tokens:
            history.append(proposed)
        source = distribution(logits, chain, history)
        return sample_token(source, numbers.at(len(history.tokens), Purpose.DRAFT)), source

    @staticmethod
    def _schedule(group: SamplingGroup) -> ScheduledSequence:
        lead = group.lead
        tokens = [*lead.tokens, *group.proposal.tokens]
        pending = tuple(tokens[lead.num_draft_cached :])
        return ScheduledSequence(lead.blocks, lead.num_draft_cached, pending, 1, group.sampling)
