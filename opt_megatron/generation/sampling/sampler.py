"""The sampler: from logits to a token. Which processors change the scores before is in `logits_processors.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import UserError
from .logits_processors import ProcessorChain, suppress
from .random_numbers import RandomNumbers
from .token_history import TokenHistory

__all__ = [
    "SamplerState",
    "choose_token",
    "choose_tokens",
    "distribution",
    "filtered_scores",
    "sample_token",
    "top_log_probabilities",
    "vocab_ranks",
]


class SamplerState(NamedTuple):
    """What the choice of a sequence's next token depends on besides the logits.

    Attributes:
        chain: the processors of its options.
        history: its tokens so far.
        numbers: the random numbers of its tokens.
    """

    chain: ProcessorChain
    history: TokenHistory
    numbers: RandomNumbers


def choose_tokens(logits: Sequence[Tensor], states: Sequence[SamplerState]) -> list[int | Exception]:
    """The next token of every sequence, the same as if it were alone; where none can be chosen, the error instead.

    Args:
        logits: [vocabulary] for each sequence.
    """
    tokens: list[int | Exception] = []
    for row, state in zip(logits, states, strict=True):
        try:
            tokens.append(choose_token(row, state))
        except Exception as error:
            tokens.append(error)
    return tokens


def choose_token(logits: Tensor, state: SamplerState) -> int:
    """The next token of one sequence.

    Args:
        logits: [vocabulary].

    Raises:
        UserError: no token is possible.
    """
    chain = state.chain
    if chain.is_plain_greedy:
        return int(suppress(logits, chain.suppressed).argmax())
    ids, scores = _possible_candidates(logits, chain, state.history)
    if chain.is_greedy:
        index = int(scores.argmax())
    else:
        # Not normalised, as in `batch_sampler.py`, so that the two choose the same token.
        index = sample_token((scores - scores.max()).exp(), state.numbers.at(len(state.history.tokens)))
    return index if ids is None else int(ids[index])


def distribution(logits: Tensor, chain: ProcessorChain, history: TokenHistory) -> Tensor:
    """The probabilities [vocabulary], float32, that `choose_token` samples from; all on one token when greedy.

    Args:
        logits: [vocabulary].

    Raises:
        UserError: no token is possible.
    """
    ids, scores = _possible_candidates(logits, chain, history)
    if chain.is_greedy:
        return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
    probabilities = scores.softmax(-1)
    if ids is None:
        return probabilities
    return torch.zeros(len(logits), device=logits.device).index_copy(0, ids, probabilities)


def sample_token(probabilities: Tensor, number: float) -> int:
    """Sample a token: the first at which the cumulative probability exceeds a random share of the total.

    A token with probability 0 adds nothing to the sum, and so is never the first to exceed it.

    Args:
        probabilities: [vocabulary], 0 or above; they need not add up to 1.
        number: the share, from 0 up to but not including 1, of as many bits as float64 has (float32 has too few values
            to reach tokens less likely than 1e-7).

    Raises:
        UserError: all are 0, or some are not numbers.
    """
    cumulative = probabilities.double().cumsum(0)
    total = cumulative[-1]
    if not 0 < float(total) < math.inf:
        raise no_token_possible()
    # Rounding could make the product equal to the total, which no sum exceeds: then it is the first to reach it.
    return int(
        torch.minimum(torch.searchsorted(cumulative, number * total, right=True), torch.searchsorted(cumulative, total))
    )


def filtered_scores(logits: Tensor, chain: ProcessorChain, history: TokenHistory) -> Tensor:
    """The scores after all processors; the softmax of the result is the distribution that is sampled.

    Args:
        logits: [vocabulary] or [1, vocabulary].

    Returns:
        The same shape, float32; all -inf where no token is possible.
    """
    ids, scores = _candidates(logits.reshape(-1), chain, history)
    if ids is not None:
        scores = torch.full((logits.size(-1),), -math.inf, device=scores.device).index_copy(0, ids, scores)
    return scores.reshape(logits.shape)


def top_log_probabilities(
    logits: Tensor, chosen: Sequence[int], n: int, ids: Sequence[int] = ()
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Natural log-probabilities by the model alone, before any processor.

    Args:
        logits: [rows, vocabulary].
        chosen: each row's token.
        n: how many of the best to return, at most the vocabulary.
        ids: if there are any, they are returned instead of the best.

    Returns:
        For each row the chosen token's, and the n best as (id, log-probability), best first and of equal ones the
        lower id first; or `ids` in their order.
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(1, torch.tensor(chosen, device=scores.device)[:, None]).squeeze(1).tolist()
    if ids:
        values = scores[:, list(ids)].tolist()
        return [(value, tuple(zip(ids, row, strict=True))) for value, row in zip(own, values, strict=True)]
    if n == 0:
        return [(value, ()) for value in own]
    best = scores.topk(min(n, scores.size(-1)))
    rows = zip(own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        (value, tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))))
        for value, ids, values in rows
    ]


def vocab_ranks(logits: Tensor, chosen: Sequence[int]) -> list[int]:
    """Where each row's token stands among all by its probability, from 1; of equal ones the last place, as in vLLM.

    Args:
        logits: [rows, vocabulary].
    """
    own = logits.gather(1, torch.tensor(chosen, device=logits.device)[:, None])
    return (logits >= own).sum(-1).tolist()


def _possible_candidates(logits: Tensor, chain: ProcessorChain, history: TokenHistory) -> tuple[Tensor | None, Tensor]:
    """`_candidates`, or UserError where there is none."""
    ids, scores = _candidates(logits, chain, history)
    if not scores.max() > -math.inf:  # true of NaN as well
        raise no_token_possible()
    return ids, scores


def _candidates(logits: Tensor, chain: ProcessorChain, history: TokenHistory) -> tuple[Tensor | None, Tensor]:
    """Tokens that may be chosen, and their scores after all processors.

    Args:
        logits: [vocabulary].

    Returns:
        Ids [candidates] int64 in ascending order, or None for all of the vocabulary; scores [candidates].
    """
    params, scores, ids = chain.params, logits.float(), None
    for processor in chain.processors:
        scores = processor.apply(scores, params, history)
    scores = suppress(scores, chain.suppressed)
    if chain.is_greedy or not scores.max() > -math.inf:  # nothing is possible: the caller decides what that means
        return None, scores
    for processor in chain.sampling_processors:
        if processor.selects:
            kept = processor.apply(scores, params, history)
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        else:
            scores = processor.apply(scores, params, history)
    return ids, scores


def no_token_possible() -> UserError:
    """The error of a choice among no tokens."""
    return UserError(
        "no token is possible: all of them are ruled out (allowed_token_ids, bad_words, banned_tokens, "
        "min_new_tokens), or the model's scores are not numbers"
    )
