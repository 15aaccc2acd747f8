"""What the engine runs: a branch is one continuation of a request, with the sequences that it needs in the cache.

Sampling needs one sequence, beam search and contrastive search (`beam.py`, `contrastive.py`) several that
begin alike. The engine asks every branch what it wants to feed, makes one step of all, and gives each its
outputs; a branch answers with events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..request import Request, TokenEvent, TopLogProbs
from ..sampling.sampler import TokenHistory, distribution, draw, top_log_probabilities
from ..step import Extent, Output
from .detokenizer import Continuation


@dataclass(eq=False)
class CachedSequence:
    """Tokens, and how many of them have their keys and values in the cache.

    Attributes:
        extent: None until it is admitted.
        cached: of the model; draft_cached: of the draft model, in the same extent of its own cache.
    """

    tokens: list[int]
    extent: Extent | None = None
    cached: int = 0
    draft_cached: int = 0

    @property
    def pending(self) -> int:
        """Tokens that must be fed before the next can be chosen."""
        return len(self.tokens) - self.cached


@dataclass(frozen=True)
class Feed:
    """What a branch wants in a step: `count` pending tokens of a sequence, then `proposed` ones."""

    sequence: CachedSequence
    count: int
    asked: int
    proposed: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """What is fed."""
        begin = self.sequence.cached
        return (*self.sequence.tokens[begin : begin + self.count], *self.proposed)


@dataclass
class Proposal:
    """Tokens that a draft proposes, and the distribution [V] that each was drawn from (None: it was certain)."""

    tokens: list[int] = field(default_factory=list)
    distributions: list[Tensor | None] = field(default_factory=list)


# copy(source, target, begin, end): tokens [begin, end) of one sequence's keys and values over another's.
Copy = Callable[[CachedSequence, CachedSequence, int, int], None]


class Branch:
    """What all kinds have in common.

    Attributes:
        number: the request's.
        sequences: as many as the branch may need at a time; the first one begins as the prompt.
        size: tokens of each sequence's extent.
        output: what it must be given.
        may_share: a prefix of the prompt may come from another sequence's cache.
    """

    may_share = True

    def __init__(self, number: int, request: Request, choice: int, num_sequences: int, size: int) -> None:
        self.number, self.request, self.choice, self.size = number, request, choice, size
        self.sequences = [CachedSequence(list(request.prompt)) for _ in range(num_sequences)]
        self.is_finished = False

    @property
    def lead(self) -> CachedSequence:
        """The sequence that the prompt is computed in."""
        return self.sequences[0]

    @property
    def output(self) -> Output:
        """What kind of output its choice needs."""
        return Output.LOGITS

    @property
    def is_prefilling(self) -> bool:
        """More than one token is to be fed before anything can be chosen."""
        return self.lead.pending > 1

    def feeds(self, budget: int) -> list[Feed]:
        """What to feed now; of a prompt at most `budget` tokens, and the outputs that are needed."""
        raise NotImplementedError

    def take(self, feeds: Sequence[Feed], outputs: Sequence[Tensor], copy: Copy) -> list[TokenEvent]:
        """Go on with the outputs [asked, ...] of the feeds."""
        raise NotImplementedError

    def cancelled(self) -> list[TokenEvent]:
        """End now."""
        self.is_finished = True
        return [TokenEvent(self.number, None, "", "cancelled", self.choice)]


class SamplingBranch(Branch):
    """One continuation, greedy or sampled, with or without a draft's proposals."""

    def __init__(self, number: int, request: Request, eos: int | None, choice: int = 0) -> None:
        params = request.params
        super().__init__(number, request, choice, 1, len(request.prompt) + max(0, params.max_new_tokens - 1))
        self.history = TokenHistory(request.prompt, eos)
        self.generator = torch.Generator().manual_seed(seed_of_choice(params.seed, choice))
        self.proposal = Proposal()
        self.sum_of_logprobs = 0.0
        self._echo = params.echo and choice == 0
        self.may_share = not self._echo  # every token of the prompt must give its probabilities
        # How many alternatives to report with every token; None for no probabilities at all.
        self._reported = 0 if params.best_of is not None and params.logprobs is None else params.logprobs
        self._continuation = Continuation(request, eos, choice)
        self._prompt_decoder = request.decoder() if self._echo and request.decoder else None

    @property
    def output(self) -> Output:
        """The best ids alone, where nothing else can be chosen or is reported."""
        plain = self.request.params.is_plain_greedy and self._reported is None and not self._echo
        return Output.BEST if plain else Output.LOGITS

    @property
    def room_for_proposals(self) -> int:
        """Tokens that a draft may propose: the last new token is never fed."""
        # None for the first new token, however the prompt came into the cache: a seed gives one text.
        if len(self.lead.tokens) == len(self.request.prompt):
            return 0
        return max(0, self.size - len(self.lead.tokens))

    def feeds(self, budget: int) -> list[Feed]:
        """A piece of the prompt, or the newest token and what is proposed to follow it."""
        sequence = self.lead
        if sequence.pending == 1:
            proposed = tuple(self.proposal.tokens)
            return [Feed(sequence, 1, 1 + len(proposed), proposed)]
        count = min(sequence.pending, budget)
        if count == 0:
            return []
        asked = count if self._echo else int(count == sequence.pending)
        return [Feed(sequence, count, asked)]

    def take(self, feeds: Sequence[Feed], outputs: Sequence[Tensor], copy: Copy) -> list[TokenEvent]:
        """Verify proposals and choose. (The engine chooses for branches without proposals itself, many at once.)"""
        (feed,), (output,) = feeds, outputs
        events = self.advance(feed, output)
        if self.lead.pending or self.is_finished:
            return events
        if self.output is Output.BEST:
            return events + self._accept_best(output[-1 - len(feed.proposed) :, 0].long().tolist())
        return events + self._accept_sampled(output[-1 - len(feed.proposed) :])

    def advance(self, feed: Feed, output: Tensor) -> list[TokenEvent]:
        """Count what was fed as cached, and report the prompt's tokens where they are asked for.

        If nothing is pending then, and the branch has not ended, the next token is to be chosen.
        """
        begin, sequence = self.lead.cached, self.lead
        sequence.cached += feed.count
        is_prompt = begin < len(self.request.prompt)
        return self._echo_events(begin, sequence.cached, output) if self._echo and is_prompt else []

    def _echo_events(self, begin: int, end: int, output: Tensor) -> list[TokenEvent]:
        """Output i speaks of the token after position begin + i; the first token has no probability."""
        prompt = self.request.prompt
        predicted = list(prompt[begin + 1 : end + 1])
        scores = top_log_probabilities(output[: len(predicted)], predicted, self._reported or 0)
        events = [self._echo_event(prompt[0], None, ())] if begin == 0 else []
        events += [self._echo_event(token, *score) for token, score in zip(predicted, scores, strict=True)]
        if end >= len(prompt) - 1 and self.request.params.max_new_tokens == 0:  # nothing is left to predict
            self.is_finished = True
            events[-1] = replace(events[-1], finish_reason="length")
        return events

    def _echo_event(self, token: int, logprob: float | None, top: TopLogProbs) -> TokenEvent:
        text = self._prompt_decoder.push(token) if self._prompt_decoder else ""
        return TokenEvent(self.number, token, text, None, 0, logprob, top, is_prompt=True)

    def _accept_best(self, best: list[int]) -> list[TokenEvent]:
        """Greedy: a proposal holds as long as it is what the model itself would have chosen."""
        events = []
        for index, token in enumerate(best):
            events.append(self.accept(token))
            if self.is_finished or index == len(self.proposal.tokens) or self.proposal.tokens[index] != token:
                break
        return self._settle(events)

    def _accept_sampled(self, logits: Tensor) -> list[TokenEvent]:
        """Speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1), for any filters.

        A proposal drawn from q is kept with probability min(1, p/q); else the token is drawn from what p has
        more than q. Whatever the draft proposes, tokens follow p.
        """
        events, proposal, params = [], self.proposal, self.request.params
        for index, row in enumerate(logits):
            target = distribution(row, params, self.history)
            if index == len(proposal.tokens):
                token, kept = draw(target, self.generator), False
            else:
                token, kept = self._verify(target, proposal.tokens[index], proposal.distributions[index])
            events.append(self.accept(token, row))
            if self.is_finished or not kept:
                break
        return self._settle(events)

    def _verify(self, target: Tensor, proposed: int, source: Tensor | None) -> tuple[int, bool]:
        chance = torch.rand((), generator=self.generator, dtype=torch.float64)
        ratio = target[proposed].double() / (1.0 if source is None else source[proposed].double())
        if chance < ratio:
            return proposed, True
        rest = target.clone()
        if source is None:
            rest[proposed] = 0
        else:
            rest = (rest - source).clamp_(min=0)
        # p and q may differ by rounding alone; then p itself is the answer.
        rest = rest / rest.sum() if rest.sum() > 0 else target
        return draw(rest, self.generator), False

    def _settle(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """Of what was fed, the newest token and the proposals that held are cached: all tokens but the last."""
        sequence = self.lead
        sequence.cached = len(sequence.tokens) - 1
        sequence.draft_cached = min(sequence.draft_cached, sequence.cached)
        self.proposal = Proposal()
        return events

    def accept(self, token: int, logits: Tensor | None = None) -> TokenEvent:
        """Take the next token; `logits` [V] where probabilities are reported."""
        logprob, top = None, ()
        if self._reported is not None:
            logprob, top = top_log_probabilities(logits[None], [token], self._reported)[0]
        self.lead.tokens.append(token)
        self.history.append(token)
        self.sum_of_logprobs += logprob or 0.0
        text, reason = self._continuation.push(token)
        self.is_finished = reason is not None
        return TokenEvent(self.number, token, text, reason, self.choice, logprob, top)


class BestOf:
    """Holds back a request's continuations until all have ended, and lets the `n` likeliest through.

    As metaseq: independent samples, ranked by the sum of their tokens' log-probabilities.
    """

    def __init__(self, n: int, best_of: int) -> None:
        self._n, self._left = n, best_of
        self._events: dict[int, list[TokenEvent]] = {}
        self._sums: dict[int, float] = {}

    def add(self, branch: SamplingBranch, events: list[TokenEvent]) -> list[TokenEvent]:
        """Take a branch's events; what can be shown now."""
        shown = [event for event in events if event.is_prompt]
        self._events.setdefault(branch.choice, []).extend(event for event in events if not event.is_prompt)
        self._sums[branch.choice] = branch.sum_of_logprobs
        if not branch.is_finished:
            return shown
        self._left -= 1
        return shown + (self._ranked(branch.request.params.logprobs is None) if self.is_finished else [])

    @property
    def is_finished(self) -> bool:
        """All have ended."""
        return self._left == 0

    def cancelled(self, number: int) -> list[TokenEvent]:
        """End now, with nothing shown of any continuation."""
        return [TokenEvent(number, None, "", "cancelled", choice) for choice in range(self._n)]

    def _ranked(self, hide_logprobs: bool) -> list[TokenEvent]:
        best = sorted(self._sums, key=lambda choice: -self._sums[choice])[: self._n]
        return [
            replace(event, choice=rank, logprob=None if hide_logprobs else event.logprob)
            for rank, choice in enumerate(best)
            for event in self._events[choice]
        ]


def seed_of_choice(seed: int, choice: int) -> int:
    """A seed for each of a request's continuations; the first one's is the request's own."""
    return (seed + choice * 0x9E3779B97F4A7C15) % 2**63  # 2**64 divided by the golden ratio: spreads over all bits
