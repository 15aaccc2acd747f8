"""Contrastive search (Su et al. 2022, arXiv:2202.06417): likely tokens that do not repeat what was said.

Of the k likeliest next tokens v the one is taken that has the highest

    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

where h_v is the hidden state that v would have after the last layer, and j runs over all tokens before it. So
every candidate is fed before one is taken: k sequences that differ in their newest token only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import UserError
from ..request import Request, TokenEvent, TopLogProbs
from ..sampling.sampler import TokenHistory, filtered_scores, top_log_probabilities
from ..step import Output
from .detokenizer import Continuation
from .sequences import Branch, Copy, Feed


class ContrastiveBranch(Branch):
    """A request under contrastive search.

    Args:
        num_tokens: width of the logits in an output; hidden states stand behind them.
    """

    may_share = False  # the hidden states of the whole prompt are needed

    def __init__(self, number: int, request: Request, eos: int | None, num_tokens: int) -> None:
        params = request.params
        # Candidates are fed even for the last token: one more than sampling needs.
        super().__init__(number, request, 0, params.top_k, len(request.prompt) + params.max_new_tokens)
        self._num_tokens = num_tokens
        # top_k is the number of candidates; p(v) is over the whole vocabulary.
        self._filters = replace(params, top_k=0, penalty_alpha=0.0)
        self._history = TokenHistory(request.prompt, eos)
        self._continuation = Continuation(request, eos)
        self._context: Tensor | None = None  # normalised hidden states [tokens so far, H]
        self._logits: Tensor | None = None  # [V], those that the candidates come from
        self._probabilities: list[float] = []

    @property
    def output(self) -> Output:
        """Logits and hidden states."""
        return Output.HIDDEN

    def feeds(self, budget: int) -> list[Feed]:
        """A piece of the prompt, all of whose hidden states are needed, or a candidate in each sequence."""
        if self._logits is None:
            count = min(self.lead.pending, max(budget, 1))  # the last token comes with those that decode
            return [Feed(self.lead, count, count)]
        return [Feed(sequence, 1, 1) for sequence in self.sequences]

    def take(self, feeds: Sequence[Feed], outputs: Sequence[Tensor], copy: Copy) -> list[TokenEvent]:
        """Take the best candidate, and find the next ones."""
        output = torch.cat(list(outputs)).cpu()
        logits, hidden = output[:, : self._num_tokens], normalize(output[:, self._num_tokens :], dim=-1)
        for feed in feeds:
            feed.sequence.cached += feed.count
        if self._logits is None:
            self._context = hidden if self._context is None else torch.cat((self._context, hidden))
            if not self.lead.pending:
                self._start(logits[-1], copy)
            return []
        winner = self._choose(hidden)
        event = self._accept(feeds[winner].sequence.tokens[-1])
        if not self.is_finished:
            self._agree(winner, copy)
            self._context = torch.cat((self._context, hidden[winner : winner + 1]))
            self._propose(logits[winner])
        return [event]

    def _start(self, logits: Tensor, copy: Copy) -> None:
        lead = self.lead
        for sequence in self.sequences[1:]:
            copy(lead, sequence, 0, lead.cached)
            sequence.cached = lead.cached
        self._propose(logits)

    def _propose(self, logits: Tensor) -> None:
        """Append a candidate to each sequence."""
        self._logits = logits
        scores = filtered_scores(logits, self._filters, self._history)
        if scores.isfinite().sum() < len(self.sequences):
            raise UserError(f"options leave fewer tokens possible than top_k, which is {len(self.sequences)}")
        probabilities, tokens = scores.softmax(-1).topk(len(self.sequences))
        self._probabilities = probabilities.tolist()
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)

    def _choose(self, hidden: Tensor) -> int:
        alpha = self.request.params.penalty_alpha
        likeness = (hidden @ self._context.T).amax(1)  # [k]
        return int(((1 - alpha) * torch.tensor(self._probabilities) - alpha * likeness).argmax())

    def _agree(self, winner: int, copy: Copy) -> None:
        """Make all sequences the winner's: they differ in one token."""
        source = self.sequences[winner]
        for sequence in self.sequences:
            if sequence is not source:
                copy(source, sequence, source.cached - 1, source.cached)
                sequence.tokens[-1] = source.tokens[-1]

    def _accept(self, token: int) -> TokenEvent:
        self._history.append(token)
        score: tuple[float | None, TopLogProbs] = (None, ())
        if self.request.params.logprobs is not None:
            score = top_log_probabilities(self._logits[None], [token], self.request.params.logprobs)[0]
        text, reason = self._continuation.push(token)
        self.is_finished = reason is not None
        return TokenEvent(self.number, token, text, reason, 0, *score)
