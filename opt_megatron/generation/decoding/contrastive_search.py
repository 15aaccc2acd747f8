"""Contrastive search (Su et al. 2022, arXiv:2202.06417): likely tokens that do not repeat the context.

Of the k likeliest next tokens v, the one with the highest

    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

is chosen, where h_v is the hidden state that v would have after the last layer, and j runs over all tokens before it.
So every candidate is computed before one is chosen: k sequences that differ only in their newest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...errors import UserError
from ..request import Request, TokenEvent, TopLogProbs
from ..sampling.logits_processors import ProcessorChain
from ..sampling.sampler import filtered_scores, top_log_probabilities
from ..sampling.token_history import TokenHistory
from ..step import OutputKind, ScheduledSequence
from .detokenizer import IncrementalDetokenizer
from .sequences import CopyCache, SequenceGroup


class ContrastiveSearchGroup(SequenceGroup):
    """A request under contrastive search.

    Args:
        vocab_size: width of the logits in an output, which hidden states follow.
    """

    output_kind = OutputKind.HIDDEN_STATES
    can_share_prefix = False  # the hidden states of the whole prompt are needed

    def __init__(
        self, request_id: int, request: Request, eos: Sequence[int], vocab_size: int, suppressed: Tensor
    ) -> None:
        params = request.params
        # Candidates are computed even for the last token: one more than sampling needs.
        super().__init__(request_id, request, 0, params.top_k, len(request.prompt) + params.max_new_tokens)
        self._vocab_size = vocab_size
        # top_k is the number of candidates; p(v) is over the whole vocabulary.
        self._chain = ProcessorChain(replace(params, top_k=0, penalty_alpha=0.0), suppressed)
        self._history = TokenHistory(request.prompt, eos)
        self._detokenizer = IncrementalDetokenizer(request, eos)
        self._context = torch.empty(0)  # normalised hidden states [tokens so far, H]
        self._logits: Tensor | None = None  # [V], those that the candidates come from
        self._probabilities: list[float] = []  # of the candidates

    def schedule(self, budget: int) -> list[ScheduledSequence]:
        """A piece of the prompt, all of whose hidden states are needed, or a candidate in each sequence."""
        if self._logits is None:
            # The prompt's last token is scheduled without budget, with the tokens that decode.
            count = min(self.lead.num_pending, max(budget, 1))
            return [self.lead.schedule(count, count)]
        return [sequence.schedule(1, 1) for sequence in self.sequences]

    def process_outputs(
        self, scheduled: Sequence[ScheduledSequence], outputs: Sequence[Tensor], copy: CopyCache
    ) -> list[TokenEvent]:
        """Choose the best candidate, and find the next ones."""
        output = torch.cat(list(outputs))
        logits, hidden = output[:, : self._vocab_size], normalize(output[:, self._vocab_size :], dim=-1)
        if self._logits is None:
            self._context = torch.cat((self._context, hidden)) if len(self._context) else hidden
            if not self.lead.num_pending:
                self._copy_prompt(copy)
                self._propose(logits[-1])
            return []
        winner = self._best_candidate(hidden)
        event = self._accept_token(self.sequences[winner].tokens[-1], self._logits)
        if not self.is_finished:
            self._adopt(winner, copy)
            self._context = torch.cat((self._context, hidden[winner : winner + 1]))
            self._propose(logits[winner])
        return [event]

    def _copy_prompt(self, copy: CopyCache) -> None:
        for sequence in self.sequences[1:]:
            copy(self.lead, sequence, 0, self.lead.num_cached)
            sequence.num_cached = self.lead.num_cached

    def _propose(self, logits: Tensor) -> None:
        """Append a candidate to each sequence."""
        self._logits = logits
        scores = filtered_scores(logits, self._chain, self._history)
        if scores.isfinite().sum() < len(self.sequences):
            raise UserError(f"options leave fewer tokens possible than top_k, which is {len(self.sequences)}")
        probabilities, tokens = scores.softmax(-1).topk(len(self.sequences))
        self._probabilities = probabilities.tolist()
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            sequence.tokens.append(token)

    def _best_candidate(self, hidden: Tensor) -> int:
        """The index of the candidate to choose, by the hidden states [k, H] of all."""
        alpha = self.request.params.penalty_alpha
        similarity = (hidden @ self._context.T).amax(1)  # [k]
        return int(((1 - alpha) * torch.tensor(self._probabilities) - alpha * similarity).argmax())

    def _adopt(self, winner: int, copy: CopyCache) -> None:
        """Make all sequences equal to the winner's: they differ in one token."""
        source = self.sequences[winner]
        for sequence in self.sequences:
            if sequence is not source:
                copy(source, sequence, source.num_cached - 1, source.num_cached)
                sequence.tokens[-1] = source.tokens[-1]

    def _accept_token(self, token: int, logits: Tensor) -> TokenEvent:
        self._history.append(token)
        score: tuple[float | None, TopLogProbs] = (None, ())
        params = self.request.params
        if params.logprobs is not None:
            (score,) = top_log_probabilities(logits[None], [token], params.logprobs, params.logprob_token_ids)
        text, reason = self._detokenizer.push(token)
        self.is_finished = reason is not None
        return TokenEvent(self.request_id, token, text, reason, 0, *score, stop_reason=self._detokenizer.stop_reason)
