"""Greedy search and sampling: a group of one sequence, with or without proposals of a draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..request import Request, TextDecoder, TokenEvent, TopLogProbs
from ..sampling.logits_processors import NO_IDS, ProcessorChain
from ..sampling.sampler import SamplerState, distribution, sample_token, top_log_probabilities
from ..sampling.token_history import TokenHistory
from ..step import OutputKind, ScheduledSequence
from .detokenizer import IncrementalDetokenizer
from .sequences import CopyCache, SequenceGroup
from .speculative import Proposal, verify_token


class SamplingGroup(SequenceGroup):
    """One greedy or sampled continuation.

    Attributes:
        history: the sequence's tokens, the same list as `lead.tokens`.
        sampler_state: what the choice of the next token depends on besides the logits.
        proposal: tokens that a draft proposes for the next step.
        logprob_sum: of the output's tokens, where log-probabilities are computed.
    """

    def __init__(
        self, request_id: int, request: Request, eos: Sequence[int], choice: int = 0, suppressed: Tensor = NO_IDS
    ) -> None:
        params = request.params
        super().__init__(request_id, request, choice, 1, len(request.prompt) + max(0, params.max_new_tokens - 1))
        self.history = TokenHistory(request.prompt, eos)
        self.lead.tokens = self.history.tokens
        generator = torch.Generator().manual_seed(seed_of_choice(params.seed, choice))
        self.sampler_state = SamplerState(ProcessorChain(params, suppressed), self.history, generator)
        self.proposal = Proposal()
        self.logprob_sum = 0.0
        # How many alternatives to report with every token; None for no log-probabilities at all.
        self._num_logprobs = 0 if params.best_of is not None and params.logprobs is None else params.logprobs
        self._num_prompt_logprobs = params.num_prompt_logprobs if choice == 0 else None
        # Every token of a prompt that is reported must give its log-probability.
        self.can_share_prefix = self._num_prompt_logprobs is None
        if self.sampler_state.chain.is_plain_greedy and self._num_logprobs is self._num_prompt_logprobs is None:
            self.output_kind = OutputKind.ARGMAX
        self._detokenizer = IncrementalDetokenizer(request, eos)
        self._prompt_decoder: TextDecoder | None = None
        if self._num_prompt_logprobs is not None and request.decoder is not None:
            self._prompt_decoder = request.decoder(skip_special_tokens=params.skip_special_tokens)

    @property
    def max_proposed_tokens(self) -> int:
        """How many tokens a draft may propose: the last new token is never computed."""
        # None for the first new token, whether the prompt was computed or copied: a seed always gives the same text.
        if len(self.lead.tokens) == len(self.request.prompt):
            return 0
        return max(0, self.max_length - len(self.lead.tokens))

    def schedule(self, budget: int) -> list[ScheduledSequence]:
        """A piece of the prompt, or the newest token and those proposed to follow it."""
        lead = self.lead
        pending = lead.num_pending
        if pending == 1:
            proposed = self.proposal.tokens
            return [lead.schedule(1, 1 + len(proposed), proposed)]
        count = min(pending, budget)
        if count == 0:
            return []
        reports_prompt = self._num_prompt_logprobs is not None
        return [lead.schedule(count, count if reports_prompt else int(count == pending))]

    def process_outputs(
        self, scheduled: Sequence[ScheduledSequence], outputs: Sequence[Tensor], copy: CopyCache
    ) -> list[TokenEvent]:
        """Verify proposals and choose the next token. (Without proposals, the engine's `OutputProcessor` calls
        `update_cached` and chooses the tokens of all groups together.)"""
        (sequence,), (output,) = scheduled, outputs
        events = self.update_cached(sequence, output)
        if self.lead.num_pending or self.is_finished:
            return events
        rows = output[-1 - len(self.proposal.tokens) :]
        events += self._accept_greedy(rows) if self.output_kind is OutputKind.ARGMAX else self._accept_sampled(rows)
        # The newest token and the accepted proposals were computed: all tokens but the last are cached.
        self.lead.num_cached = len(self.lead.tokens) - 1
        self.lead.num_draft_cached = min(self.lead.num_draft_cached, self.lead.num_cached)
        self.proposal = Proposal()
        return events

    def update_cached(self, scheduled: ScheduledSequence, output: Tensor) -> list[TokenEvent]:
        """Count the computed tokens as cached; returns the events of the prompt's tokens, and of an end without tokens.

        If nothing is pending then, and the group is not finished, the next token is to be chosen.
        """
        begin = self.lead.num_cached
        self.lead.num_cached += len(scheduled.tokens) - len(self.proposal.tokens)
        events: list[TokenEvent] = []
        if self._num_prompt_logprobs is not None and begin < len(self.request.prompt):
            events = self._prompt_events(begin, self.lead.num_cached, output, self._num_prompt_logprobs)
        if self.request.params.max_new_tokens == 0 and not self.lead.num_pending:
            self.is_finished = True
            end = TokenEvent(self.request_id, None, "", "length", self.choice, num_cached_tokens=self.num_shared_tokens)
            events.append(end)
        return events

    def accept_token(self, token: int, logits: Tensor | None = None) -> TokenEvent:
        """Append the next token; `logits` [V] are needed where log-probabilities are reported."""
        logprob: float | None = None
        top: TopLogProbs = ()
        if self._num_logprobs is not None and logits is not None:
            ((logprob, top),) = top_log_probabilities(logits[None], [token], self._num_logprobs)
            self.logprob_sum += logprob
        self.lead.tokens.append(token)
        text, reason = self._detokenizer.push(token)
        self.is_finished = reason is not None
        return TokenEvent(
            self.request_id, token, text, reason, self.choice, logprob, top, num_cached_tokens=self.num_shared_tokens
        )

    def _prompt_events(self, begin: int, end: int, output: Tensor, num_logprobs: int) -> list[TokenEvent]:
        """Output i predicts the token after position begin + i; the first token has no log-probability."""
        prompt = self.request.prompt
        predicted = list(prompt[begin + 1 : end + 1])
        scores = top_log_probabilities(output[: len(predicted)], predicted, num_logprobs)
        events = [self._prompt_event(prompt[0], None, ())] if begin == 0 else []
        return events + [self._prompt_event(token, *score) for token, score in zip(predicted, scores, strict=True)]

    def _prompt_event(self, token: int, logprob: float | None, top: TopLogProbs) -> TokenEvent:
        text = self._prompt_decoder.push(token) if self._prompt_decoder else ""
        return TokenEvent(self.request_id, token, text, None, 0, logprob, top, is_prompt=True)

    def _accept_greedy(self, rows: Tensor) -> list[TokenEvent]:
        """A proposal is accepted as long as it is what the model itself would have chosen."""
        events, proposed = [], self.proposal.tokens
        for index, token in enumerate(rows[:, 0].long().tolist()):
            events.append(self.accept_token(token))
            if self.is_finished or index == len(proposed) or proposed[index] != token:
                break
        return events

    def _accept_sampled(self, rows: Tensor) -> list[TokenEvent]:
        """Speculative sampling, with any processors."""
        events, proposal, (chain, history, generator) = [], self.proposal, self.sampler_state
        for index, row in enumerate(rows):
            target = distribution(row, chain, history)
            if index == len(proposal.tokens):
                token, is_accepted = sample_token(target, generator), False
            else:
                token, is_accepted = verify_token(
                    target, proposal.tokens[index], proposal.distributions[index], generator
                )
            events.append(self.accept_token(token, row))
            if self.is_finished or not is_accepted:
                break
        return events


def seed_of_choice(seed: int, choice: int) -> int:
    """A seed for each of a request's continuations; the first one's is the request's own."""
    return (seed + choice * 0x9E3779B97F4A7C15) % 2**63  # 2**64 divided by the golden ratio: spreads over all bits
