"""Greedy search and sampling: a group of one sequence, with or without proposals of a draft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..request import Request, TextDecoder, TokenEvent, TopLogProbs
from ..sampling.batch_sampler import SamplingRow, row_of
from ..sampling.logits_processors import NO_IDS, ProcessorChain
from ..sampling.random_numbers import RandomNumbers
from ..sampling.sampler import SamplerState, distribution, sample_token, top_log_probabilities, vocab_ranks
from ..sampling.token_history import TokenHistory
from ..step import ScheduledSequence
from .detokenizer import IncrementalDetokenizer
from .sequences import CopyCache, SequenceGroup
from .speculative import Proposal, verify_token


class SamplingGroup(SequenceGroup):
    """One greedy or sampled continuation.

    Args:
        samples_in_step: sampled tokens, as always greedy ones, are chosen in the step itself if the options allow it.

    Attributes:
        history: the sequence's tokens, the same list as `lead.tokens`.
        sampler_state: what the choice of the next token depends on besides the logits.
        sampling: how the step itself chooses the tokens; None where the leader does, from their logits.
        proposal: tokens that a draft proposes for the next step.
        logprob_sum: of the output's tokens, where log-probabilities are computed.
    """

    def __init__(
        self,
        request_id: int,
        request: Request,
        eos: Sequence[int],
        choice: int = 0,
        suppressed: Tensor = NO_IDS,
        *,
        samples_in_step: bool = False,
    ) -> None:
        params = request.params
        super().__init__(request_id, request, choice, 1, len(request.prompt) + max(0, params.max_new_tokens - 1))
        self.history = TokenHistory(request.prompt, eos)
        self.lead.tokens = self.history.tokens
        numbers = RandomNumbers(params.seed, choice)
        self.sampler_state = SamplerState(ProcessorChain(params, suppressed), self.history, numbers)
        self.proposal = Proposal()
        self.logprob_sum = 0.0
        # How many alternatives to report with every token; None for no log-probabilities at all.
        self._num_logprobs = 0 if params.best_of is not None and params.logprobs is None else params.logprobs
        self._num_prompt_logprobs = params.num_prompt_logprobs if choice == 0 else None
        # Every token of a prompt that is reported must give its log-probability.
        self.can_share_prefix = self._num_prompt_logprobs is None
        self.sampling: SamplingRow | None = None
        if self._num_logprobs is self._num_prompt_logprobs is None:
            self.sampling = self._row(samples_in_step)
        self._detokenizer = IncrementalDetokenizer(request, eos)
        self._prompt_decoder: TextDecoder | None = None
        if self._num_prompt_logprobs is not None and request.decoder is not None:
            self._prompt_decoder = request.decoder(skip_special_tokens=params.skip_special_tokens)

    def _row(self, samples_in_step: bool) -> SamplingRow | None:
        chain = self.sampler_state.chain
        can_choose = samples_in_step or chain.is_plain_greedy
        return row_of(chain, self.request.params.seed, self.choice) if can_choose else None

    @property
    def needs_newest_token(self) -> bool:
        """The next token is chosen in a step, and the newest one must have been read before: the host makes the list of
        the ids that a watermark prefers after it."""
        return self.sampling is not None and self.sampling.delta > 0

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
        if pending == 1 and lead.num_unread and self._num_chosen == self.request.params.max_new_tokens:
            return []  # the last token is chosen, and still to be read
        if pending == 1:
            proposed = self.proposal.tokens
            return [lead.schedule(1, 1 + len(proposed), proposed, self.sampling)]
        count = min(pending, budget)
        if count == 0:
            return []
        reports_prompt = self._num_prompt_logprobs is not None
        return [lead.schedule(count, count if reports_prompt else int(count == pending), sampling=self.sampling)]

    @property
    def _num_chosen(self) -> int:
        return len(self.lead.tokens) + self.lead.num_unread - len(self.request.prompt)

    def mark_computed(self, scheduled: Sequence[ScheduledSequence]) -> None:
        """Count the tokens of a step that has been started as cached, but for proposals, which may be rejected."""
        super().mark_computed(scheduled)
        self.lead.num_cached -= len(self.proposal.tokens)

    def expect_token(self) -> None:
        """The step that was marked as computed goes on while its token, if it chooses one, is not read."""
        if not self.lead.num_pending and self.request.params.max_new_tokens:
            self.lead.num_unread += 1

    def process_outputs(
        self, scheduled: Sequence[ScheduledSequence], outputs: Sequence[Tensor], copy: CopyCache
    ) -> list[TokenEvent]:
        """Verify proposals and choose the next token. (Without proposals, the engine's `OutputProcessor` calls
        `prompt_events` and chooses the tokens of all groups together.)"""
        (sequence,), (output,) = scheduled, outputs
        events = self.prompt_events(sequence, output)
        if self.is_finished or not self.is_computed(sequence):
            return events
        rows = output[-1 - len(self.proposal.tokens) :]
        events += self._accept_sampled(rows) if self.sampling is None else self._accept_chosen(rows)
        # The newest token and the accepted proposals were computed: all tokens but the last are cached.
        self.lead.num_cached = len(self.lead.tokens) - 1
        self.lead.num_draft_cached = min(self.lead.num_draft_cached, self.lead.num_cached)
        self.proposal = Proposal()
        return events

    def is_computed(self, scheduled: ScheduledSequence) -> bool:
        """Whether the step computed all tokens that are known, so that its last output is of the next one."""
        return scheduled.position + len(scheduled.tokens) >= len(self.lead.tokens)

    def prompt_events(self, scheduled: ScheduledSequence, output: Tensor) -> list[TokenEvent]:
        """The events of the prompt's tokens, and of an end without tokens.

        If the group is not finished then, and `is_computed`, the next token is to be chosen.
        """
        events: list[TokenEvent] = []
        if self._num_prompt_logprobs is not None and scheduled.position < len(self.request.prompt):
            end = scheduled.position + len(scheduled.tokens)
            events = self._scored_prompt(scheduled.position, end, output, self._num_prompt_logprobs)
        if self.request.params.max_new_tokens == 0 and self.is_computed(scheduled):
            self.is_finished = True
            end_event = TokenEvent(
                self.request_id, None, "", "length", self.choice, num_cached_tokens=self.num_shared_tokens
            )
            events.append(end_event)
        return events

    def accept_token(self, token: int, logits: Tensor | None = None) -> TokenEvent:
        """Append the next token; `logits` [V] are needed where log-probabilities are reported."""
        logprob: float | None = None
        top: TopLogProbs = ()
        if self._num_logprobs is not None and logits is not None:
            ids = self.request.params.logprob_token_ids
            ((logprob, top),) = top_log_probabilities(logits[None], [token], self._num_logprobs, ids)
            self.logprob_sum += logprob
        self.lead.tokens.append(token)
        self.lead.num_unread = max(0, self.lead.num_unread - 1)
        text, reason = self._detokenizer.push(token)
        self.is_finished = reason is not None
        return TokenEvent(
            self.request_id,
            token,
            text,
            reason,
            self.choice,
            logprob,
            top,
            num_cached_tokens=self.num_shared_tokens,
            stop_reason=self._detokenizer.stop_reason,
        )

    def _scored_prompt(self, begin: int, end: int, output: Tensor, num_logprobs: int) -> list[TokenEvent]:
        """Output i predicts the token after position begin + i; the first token has no log-probability."""
        prompt = self.request.prompt
        predicted = list(prompt[begin + 1 : end + 1])
        logits = output[: len(predicted)]
        scores = top_log_probabilities(logits, predicted, num_logprobs)
        has_ranks = self.request.params.prompt_logprobs is not None  # `echo` alone shows none
        ranks = vocab_ranks(logits, predicted) if has_ranks else [None] * len(predicted)
        events = [self._prompt_event(prompt[0], (None, ()), None)] if begin == 0 else []
        return events + list(map(self._prompt_event, predicted, scores, ranks))

    def _prompt_event(self, token: int, score: tuple[float | None, TopLogProbs], vocab_rank: int | None) -> TokenEvent:
        text = self._prompt_decoder.push(token) if self._prompt_decoder else ""
        return TokenEvent(self.request_id, token, text, None, 0, *score, is_prompt=True, vocab_rank=vocab_rank)

    def _accept_chosen(self, tokens: Tensor) -> list[TokenEvent]:
        """Greedy search: a proposal is accepted as long as it is what the model itself would have chosen."""
        events, proposed = [], self.proposal.tokens
        for index, token in enumerate(tokens.tolist()):
            events.append(self.accept_token(token))
            if self.is_finished or index == len(proposed) or proposed[index] != token:
                break
        return events

    def _accept_sampled(self, rows: Tensor) -> list[TokenEvent]:
        """Speculative sampling, with any processors."""
        events, proposal, (chain, history, numbers) = [], self.proposal, self.sampler_state
        for index, row in enumerate(rows):
            target = distribution(row, chain, history)
            position = len(history.tokens)
            if index == len(proposal.tokens):
                token, is_accepted = sample_token(target, numbers.at(position)), False
            else:
                proposed, source = proposal.tokens[index], proposal.distributions[index]
                token, is_accepted = verify_token(target, proposed, source, numbers, position)
            events.append(self.accept_token(token, row))
            if self.is_finished or not is_accepted:
                break
        return events
