"""The filters: pure functions that change scores before a token is chosen.

All take float32 scores and return new ones; a token that may not be chosen has the score -inf. Those that look at
single tokens take scores [..., vocabulary], and pass over an id beyond them, which cannot be chosen anyway; those from
`cool` on look at all tokens together and take scores [vocabulary], at least one of which is above -inf.

Each keeps what transformers' processor of the same purpose keeps. Two things are done in another way: shares of
probability are summed in float64 and rounded to float32 only to be compared with the limit, so that the result does
not depend on the order of the sum; and the vocabulary is not sorted (`_lowest_share`), which would take
longer than everything else together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_COLD = 1e-3  # temperatures below it, and
_HUGE = 1e5  # scores above it, could divide to what float32 cannot hold or tell apart
_TINY, _MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_UNSEEN = 104.0  # exp(-104) is 0 in float32
_BUCKETS = 2048
_FEW = 1024  # so few are sorted at once, and so are those
_EQUAL = 1e-30  # that differ by less: buckets would not part them


def add_bias(scores: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Add to the scores of the given ids (OpenAI's logit_bias; transformers' SequenceBiasLogitsProcessor)."""
    known = [(token, value) for token, value in bias if token < scores.size(-1)]
    if not known:
        return scores
    tokens, values = zip(*known, strict=True)
    return _add(scores, torch.tensor(tokens), torch.tensor(values, dtype=torch.float64))


def ban(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Make the given ids impossible."""
    known = [token for token in tokens if token < scores.size(-1)]
    if not known:
        return scores
    return scores.index_fill(-1, torch.tensor(known, device=scores.device), -math.inf)


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's penalty (Keskar et al. 2019, arXiv:1909.05858), as in transformers: a score above 0 is divided,
    one below 0 multiplied.

    Args:
        seen: [distinct] int64, every id of the prompt and the output once.
    """
    seen = seen[seen < scores.size(-1)].to(scores.device)
    if penalty == 1 or not len(seen):
        return scores
    penalty = min(max(penalty, _TINY), _MAX)  # in float32 it would be 0 or inf, and 0 times inf no number
    values = scores.index_select(-1, seen)
    return scores.index_copy(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def penalize_counts(scores: Tensor, tokens: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """OpenAI's penalties: score - [count > 0] * presence - count * frequency (its API reference; so do vLLM and
    metaseq).

    Args:
        tokens: [distinct] int64, ids with a count above 0.
        counts: [distinct] int64.
    """
    known = tokens < scores.size(-1)
    return _add(scores, tokens[known], -(presence + counts[known].double() * frequency))


def cool(scores: Tensor, temperature: float) -> Tensor:
    """Divide by a temperature above 0 (Ackley et al. 1985). Scores of +inf, to which an extreme penalty leads, are
    evenly likely, and all others impossible."""
    best = float(scores.max())
    if best == math.inf:
        scores = torch.where(scores.isposinf(), 0.0, -math.inf)
    elif temperature < _COLD or abs(best) > _HUGE:  # keep the best score finite; else as transformers does
        scores = scores - best
    return scores / max(temperature, _TINY)


def top_k_ids(scores: Tensor, k: int) -> Tensor:
    """The k best tokens and all that tie with the k-th (Fan et al. 2018, arXiv:1805.04833).

    Args:
        scores: [vocabulary].
        k: from 1 to the vocabulary.

    Returns:
        [k or more] int64, ids in ascending order.
    """
    return (scores >= scores.topk(k).values[-1]).nonzero().squeeze(1)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2019, arXiv:1904.09751): drop the least likely tokens whose probabilities
    together are at most 1 - p; the best token always stays. Of equal tokens, those with the lower ids go first."""
    if p >= 1:
        return scores
    best = scores.max()
    weights = (scores - best).exp().double()
    dropped = _lowest_share(scores.clamp(min=best - _UNSEEN), weights, lambda share: share.float() <= 1 - p)
    if dropped.all():  # a p so small that 1 - p is 1
        dropped[(scores == best).nonzero()[-1]] = False
    return scores.masked_fill(dropped, -math.inf)


def keep_min_p(scores: Tensor, share: float) -> Tensor:
    """Drop tokens less likely than this share of the best token's probability (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    if share == 0:
        return scores
    relative = (scores - scores.max()).exp()
    return scores.masked_fill(relative < share, -math.inf)


def keep_typical(scores: Tensor, mass: float) -> Tensor:
    """Locally typical sampling (Meister et al. 2022, arXiv:2202.00666): keep the tokens whose surprise -log p is
    nearest to its mean, the entropy, until their probabilities reach `mass`, and all that tie with the last."""
    if mass >= 1:
        return scores
    surprise = -scores.double().log_softmax(-1)
    probabilities = (-surprise).exp()
    entropy = (surprise * probabilities).nansum()
    # In float32, so that tokens as far above the entropy as others are below it tie whatever the last bits are.
    distance = (surprise - entropy).abs().float().clamp(max=_UNSEEN)
    within = _lowest_share(distance, probabilities, lambda share: share.float() < mass)
    beyond = distance[~within]
    limit = beyond.min() if len(beyond) else distance.max()
    return scores.masked_fill(distance > limit, -math.inf)


def _lowest_share(keys: Tensor, weights: Tensor, is_in: Callable[[Tensor], Tensor]) -> Tensor:
    """Which elements come first in ascending order of `keys` (equal ones in the order of their indices), for as
    long as their share of all weight, each one's own included, `is_in`.

    Only the elements around the border are sorted: keys are thrown into buckets, whose weights tell in which
    bucket the border lies, and that bucket is treated in the same way.

    Args:
        keys: [n], finite.
        weights: [n] float64, 0 or above.
        is_in: of shares, float64; true up to some share and false from there on.

    Returns:
        [n] bool.
    """
    total = weights.sum()
    return _lowest(keys, weights, lambda reached: is_in(reached / total))


def _lowest(keys: Tensor, weights: Tensor, is_in: Callable[[Tensor], Tensor]) -> Tensor:
    """`_lowest_share`, with `is_in` of the weight itself."""
    low, high = keys.aminmax()
    span = float(high - low)
    if len(keys) <= _FEW or span < _EQUAL:
        order = keys.argsort(stable=True)
        result = torch.empty_like(keys, dtype=torch.bool)
        result[order] = is_in(weights[order].cumsum(0))
        return result
    bucket = ((keys - low) * (_BUCKETS / span)).long().clamp_(max=_BUCKETS - 1)
    reached = torch.bincount(bucket, weights, _BUCKETS).cumsum(0)
    border = int(is_in(reached).sum())
    result = bucket < border
    if border < _BUCKETS:
        inside = (bucket == border).nonzero().squeeze(1)
        before = reached[border - 1] if border else 0.0
        result[inside] = _lowest(keys[inside], weights[inside], lambda more: is_in(before + more))
    return result


def _add(scores: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Add values [tokens] in float64 to the scores of different tokens; no infinite value, which could meet its
    opposite."""
    values = values.clamp(-_MAX, _MAX).to(scores.dtype).expand(*scores.shape[:-1], -1)
    return scores.index_add(-1, tokens.to(scores.device), values.to(scores.device))
