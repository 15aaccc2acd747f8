"""From logits to a token: the order of the filters, and the choice.

The order is that of transformers (`GenerationMixin._get_logits_processor`) wherever it has the filter:

 1. log-probabilities instead of logits, if asked for (FlagAI begins so; the order is the same after it)
 2. logit_bias                                    transformers: sequence_bias
 3. repetition penalty, of prompt and output      transformers: repetition_penalty (CTRL, arXiv:1909.05858)
 4. banned_tokens                                 transformers: bad_words_ids of one token
 5. min_new_tokens: nothing that ends the text    transformers: min_new_tokens
 6. presence and frequency penalties              OpenAI, vLLM: output; metaseq: prompt (its alpha_*_src)
    ------------------------------------------    greedy and beam search stop here
 7. temperature                                   transformers: temperature
 8. top-k                                         transformers: top_k (arXiv:1805.04833)
 9. top-p, or the factual nucleus                 transformers: top_p (arXiv:1904.09751); metaseq (arXiv:2206.04624)
10. min-p                                         transformers: min_p (arXiv:2407.01082)
11. typical                                       transformers: typical_p (arXiv:2202.00666)

What is ruled out stays so (-inf times or minus anything), so that it does not matter to the result whether a ban comes
before a penalty or after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ...errors import UserError
from .logits_processors import (
    add_bias,
    ban,
    cool,
    keep_min_p,
    keep_top_p,
    keep_typical,
    penalize_counts,
    penalize_repetition,
    top_k_ids,
)
from .sampling_params import SamplingParams

__all__ = [
    "SamplingParams",
    "TokenHistory",
    "choose",
    "distribution",
    "draw",
    "filtered_scores",
    "nucleus_size",
    "processed_scores",
    "top_log_probabilities",
]

Row = tuple[SamplingParams, "TokenHistory", torch.Generator]


class TokenHistory:
    """What the filters know of one row.

    Args:
        prompt: ids, BOS included.
        eos: the id that ends the text, which `min_new_tokens` holds back; None where nothing does.

    Attributes:
        tokens: ids of the prompt and the output.
        output: ids of the output.
        eos: as given.
    """

    def __init__(self, prompt: Sequence[int], eos: int | None = None) -> None:
        self.tokens = list(prompt)
        self.output: list[int] = []
        self.eos = eos
        counts = Counter(self.tokens)
        self._prompt = frozenset(counts)
        self._prompt_counts = _ids_and_counts(counts)  # never changed, and shared by copies
        self._output_counts: Counter[int] = Counter()

    def append(self, token: int) -> None:
        """Take one more token of the output."""
        self.tokens.append(token)
        self.output.append(token)
        self._output_counts[token] += 1

    def truncate(self, n_output: int) -> None:
        """Forget all but the first `n_output` tokens of the output."""
        assert 0 <= n_output <= len(self.output), (n_output, len(self.output))
        for token in self.output[n_output:]:
            self._output_counts[token] -= 1
            if not self._output_counts[token]:
                del self._output_counts[token]
        forgotten = len(self.output) - n_output
        del self.output[n_output:], self.tokens[len(self.tokens) - forgotten :]

    def copy(self) -> TokenHistory:
        """One that goes its own way from here."""
        other = TokenHistory.__new__(TokenHistory)
        other.tokens, other.output, other.eos = self.tokens.copy(), self.output.copy(), self.eos
        other._prompt, other._prompt_counts = self._prompt, self._prompt_counts
        other._output_counts = self._output_counts.copy()
        return other

    def distinct(self) -> Tensor:
        """[distinct] int64: every id of the prompt and the output once."""
        new = [token for token in self._output_counts if token not in self._prompt]
        return torch.cat([self._prompt_counts[0], torch.tensor(new, dtype=torch.int64)])

    def output_counts(self) -> tuple[Tensor, Tensor]:
        """[distinct] int64, ids of the output; [distinct] int64, how often each stands there."""
        return _ids_and_counts(self._output_counts)

    def prompt_counts(self) -> tuple[Tensor, Tensor]:
        """The same of the prompt."""
        return self._prompt_counts

    def length_of_sentence(self, ends: Container[int]) -> int:
        """Tokens of the output since its start, or since the last one that is in `ends`."""
        length = 0
        for token in reversed(self.output):
            if token in ends:
                break
            length += 1
        return length


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Choose the next token of every row, the same as if it were alone.

    Args:
        logits: [rows, vocabulary], without the vocabulary's padding rows, on any device.
        rows: each row's options, tokens so far, and generator (of the CPU; drawn from once where something is
            sampled, and not at all otherwise).

    Raises:
        UserError: in some row no token is possible.
    """
    plain = [index for index, (params, _, _) in enumerate(rows) if params.is_plain_greedy]
    others = [index for index, (params, _, _) in enumerate(rows) if not params.is_plain_greedy]
    chosen = dict(zip(plain, _rows_of(logits, plain).argmax(-1).tolist(), strict=True)) if plain else {}
    for index, row in zip(others, _rows_of(logits, others).cpu(), strict=True):
        chosen[index] = _choose_one(row, *rows[index])
    return [chosen[index] for index in range(len(rows))]


def _rows_of(logits: Tensor, indices: list[int]) -> Tensor:
    return logits if len(indices) == len(logits) else logits[indices]  # indexing would copy them all


def _choose_one(logits: Tensor, params: SamplingParams, history: TokenHistory, generator: torch.Generator) -> int:
    ids, scores = _possible(logits, params, history)
    place = int(scores.argmax()) if params.temperature == 0 else draw(scores.softmax(-1), generator)
    return place if ids is None else int(ids[place])


def distribution(logits: Tensor, params: SamplingParams, history: TokenHistory) -> Tensor:
    """The probabilities [vocabulary], float32, of which `choose` draws; all on one token when greedy.

    Args:
        logits: [vocabulary].

    Raises:
        UserError: no token is possible.
    """
    ids, scores = _possible(logits, params, history)
    if params.temperature == 0:
        return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
    probabilities = scores.softmax(-1)
    if ids is None:
        return probabilities
    return torch.zeros(len(logits), device=logits.device).index_copy(0, ids, probabilities)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draw a token: the first at which the sum of the probabilities passes a random share of their total.

    Takes one random number from the generator, in float64 (float32 has too few to reach tokens less likely than
    1e-7). A token with probability 0 adds nothing to the sum, and so is never the first to pass.

    Args:
        probabilities: [vocabulary], 0 or above; they need not add up to 1.

    Raises:
        UserError: all are 0, or some are not numbers.
    """
    reached = probabilities.double().cumsum(0)
    total = reached[-1]
    if not 0 < float(total) < math.inf:
        raise _none_possible()
    share = torch.rand((), dtype=torch.float64, generator=generator).to(total.device)
    # Rounding could make the product the total itself, which no sum passes: then it is the first to reach it.
    return int(
        torch.minimum(torch.searchsorted(reached, share * total, right=True), torch.searchsorted(reached, total))
    )


def filtered_scores(logits: Tensor, params: SamplingParams, history: TokenHistory) -> Tensor:
    """All filters in their order; the softmax of the result is the distribution that is sampled.

    Args:
        logits: [vocabulary] or [1, vocabulary].

    Returns:
        The same shape, float32; without one that is possible, all -inf.
    """
    ids, scores = _candidates(logits.reshape(-1), params, history)
    if ids is not None:
        scores = torch.full((logits.size(-1),), -math.inf, device=scores.device).index_copy(0, ids, scores)
    return scores.reshape(logits.shape)


def processed_scores(logits: Tensor, params: SamplingParams, history: TokenHistory) -> Tensor:
    """The filters before temperature, as greedy, beam and contrastive search need them.

    Args:
        logits: [..., vocabulary]; all rows have the same history.
    """
    scores = logits.float()
    if params.log_probabilities:
        scores = scores.log_softmax(-1)
    if not params.changes_scores:
        return scores
    scores = add_bias(scores, params.logit_bias)
    if params.repetition_penalty != 1:
        scores = penalize_repetition(scores, history.distinct(), params.repetition_penalty)
    scores = ban(scores, params.banned_tokens)
    if len(history.output) < params.min_new_tokens:
        scores = ban(scores, _ends(params, history))
    if params.counts_output:
        counts = history.output_counts()
        scores = penalize_counts(scores, *counts, params.presence_penalty, params.frequency_penalty)
    if params.counts_prompt:
        counts = history.prompt_counts()
        scores = penalize_counts(scores, *counts, params.prompt_presence_penalty, params.prompt_frequency_penalty)
    return scores


def _possible(logits: Tensor, params: SamplingParams, history: TokenHistory) -> tuple[Tensor | None, Tensor]:
    """`_candidates`, of which there must be one."""
    ids, scores = _candidates(logits, params, history)
    if not scores.max() > -math.inf:  # not a number either
        raise _none_possible()
    return ids, scores


def _candidates(logits: Tensor, params: SamplingParams, history: TokenHistory) -> tuple[Tensor | None, Tensor]:
    """Tokens that may be chosen, and their scores after all filters.

    Args:
        logits: [vocabulary].

    Returns:
        Ids [candidates] int64 in ascending order, or None for all of the vocabulary; scores [candidates].
    """
    scores = processed_scores(logits, params, history)
    if params.temperature == 0 or not scores.max() > -math.inf:  # nothing possible: left to who chooses
        return None, scores
    scores = cool(scores, params.temperature)
    ids = None
    if 0 < params.top_k < len(scores):  # from here on these alone: the others would only cost time
        ids = top_k_ids(scores, params.top_k)
        scores = scores[ids]
    scores = keep_top_p(scores, nucleus_size(params, history))
    scores = keep_min_p(scores, params.min_p)
    return ids, keep_typical(scores, params.typical_p)


def nucleus_size(params: SamplingParams, history: TokenHistory) -> float:
    """The top-p of the next token: of the factual nucleus (Lee et al. 2022, arXiv:2206.04624; so in metaseq) it is
    max(omega_bound, top_p * lambda_decay ** (t - 1)) for the t-th token of a sentence."""
    if params.lambda_decay == 1:
        return params.top_p
    before = history.length_of_sentence(params.sentence_end_tokens)
    return max(params.omega_bound, params.top_p * params.lambda_decay**before)


def top_log_probabilities(
    logits: Tensor, chosen: Sequence[int], n: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Natural log-probabilities by the model alone, before any filter.

    Args:
        logits: [rows, vocabulary].
        chosen: each row's token.
        n: how many of the best to name, at most the vocabulary.

    Returns:
        For each row the chosen token's, and the n best as (id, log-probability), best first and of equal ones the
        lower id first.
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(1, torch.tensor(chosen, device=scores.device)[:, None]).squeeze(1).tolist()
    if n == 0:
        return [(value, ()) for value in own]
    best = scores.topk(min(n, scores.size(-1)))
    rows = zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        (value, tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))))
        for value, ids, values in rows
    ]


def _ends(params: SamplingParams, history: TokenHistory) -> list[int]:
    """Ids that would end the text."""
    eos = [] if history.eos is None or params.ignore_eos else [history.eos]
    return [*eos, *params.stop_token_ids]


def _ids_and_counts(counts: Counter[int]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([*counts], dtype=torch.int64)
    return ids, torch.tensor([*counts.values()], dtype=torch.int64)


def _none_possible() -> UserError:
    return UserError(
        "no token is possible: all of them are ruled out (banned_tokens, min_new_tokens), or the model's scores are "
        "not numbers"
    )
