"""Drafts: tokens that are proposed cheaply and verified many at a time, without changing what comes out.

Decoding one token reads all weights; verifying five at once reads them once. Greedy output is the same as
without a draft; sampled output follows the same distribution (`branches.SamplingBranch`), though not the same
random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..sampling.sampler import distribution, draw
from ..step import Output, Row, Step
from .sequences import Proposal, SamplingBranch

_LONGEST_NGRAM = 3


class Draft(Protocol):
    """Proposes continuations."""

    def propose(self, branches: Sequence[SamplingBranch]) -> None:
        """Set each branch's `proposal`, of at most its `room_for_proposals` tokens."""


class PromptLookup:
    """Proposes what followed the last time that the newest tokens stood in the sequence.

    (Saxena 2023, "Prompt Lookup Decoding".) Costs nothing, and pays where text repeats its prompt.

    Args:
        num_tokens: proposed at a time.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._indices: dict[SamplingBranch, _NGrams] = {}

    def propose(self, branches: Sequence[SamplingBranch]) -> None:
        """Look up each branch's newest three tokens, or two."""
        self._indices = {branch: self._indices.get(branch) or _NGrams() for branch in branches}
        for branch, index in self._indices.items():
            room = min(self._num_tokens, branch.room_for_proposals)
            tokens = index.after_last(branch.lead.tokens)[:room]
            branch.proposal = Proposal(tokens, [None] * len(tokens))


class _NGrams:
    """Where each pair and triple of a growing sequence last ended."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def after_last(self, tokens: list[int]) -> list[int]:
        """What followed the latest earlier occurrence of the newest tokens."""
        for end in range(max(2, self._seen), len(tokens)):  # those that end with the newest token come in next time
            for size in range(2, min(_LONGEST_NGRAM, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in range(_LONGEST_NGRAM, 1, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end:]
        return []


class DraftModel:
    """A smaller model with a cache of its own, in which every sequence has the same extent.

    Args:
        forward: makes a step of the draft model on all ranks; the leader gets the output.
        num_tokens: proposed at a time.
    """

    def __init__(self, forward: Callable[[Step], Tensor], num_tokens: int) -> None:
        self._forward = forward
        self._num_tokens = num_tokens

    def propose(self, branches: Sequence[SamplingBranch]) -> None:
        """Draw from the draft model as the request would be drawn from the model, all branches at once."""
        for branch in branches:
            branch.proposal = Proposal()
        for index in range(self._num_tokens):
            active = [branch for branch in branches if branch.room_for_proposals > index]
            if not active:
                return
            self._propose_one(active)

    def _propose_one(self, branches: list[SamplingBranch]) -> None:
        greedy = all(branch.output is Output.BEST for branch in branches)
        rows = tuple(self._row(branch) for branch in branches)
        outputs = self._forward(Step(rows, Output.BEST if greedy else Output.LOGITS))
        for branch, row, output in zip(branches, rows, outputs, strict=True):
            branch.lead.draft_cached = row.position + len(row.tokens)
            proposal = branch.proposal
            if greedy:
                token, source = int(output[0]), None
            else:
                history = branch.history.copy()
                for earlier in proposal.tokens:
                    history.append(earlier)
                source = distribution(output, branch.request.params, history)
                token = draw(source, branch.generator)
            proposal.tokens.append(token)
            proposal.distributions.append(source)

    @staticmethod
    def _row(branch: SamplingBranch) -> Row:
        sequence = branch.lead
        tokens = [*sequence.tokens, *branch.proposal.tokens]
        return Row(sequence.extent, sequence.draft_cached, tuple(tokens[sequence.draft_cached :]), 1)
