"""Logits processors: functions that change the scores of tokens, and the order in which they run.

The functions take float32 scores and return new ones; a token that may not be chosen has the score -inf. Those that
look at single tokens take scores [..., vocabulary], and skip ids beyond it, which cannot be chosen anyway; those from
`apply_temperature` on compare all tokens and take scores [vocabulary], at least one of which is above -inf. The
watermark's is in `green_lists.py`.

Each keeps what transformers' processor of the same purpose keeps. Two things differ: probabilities are summed in
float64 and rounded to float32 only for the comparison with the limit, so that the result does not depend on the order
of summation; and the vocabulary is not sorted (`_lowest_share`), which would take longer than everything else together.

`PROCESSORS` and `SAMPLING_PROCESSORS` at the end declare which option turns on which function, and the order. A new
sampling option is its field in `sampling_params.py`, and a function and one entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .green_lists import prefer_green
from .sampling_params import SamplingParams
from .token_history import TokenHistory

COLD = 1e-3  # temperatures below this, and
HUGE = 1e5  # scores above this, could give quotients that float32 cannot represent or distinguish
TINY, _MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_UNSEEN = 104.0  # exp(-104) is 0 in float32
_BUCKETS = 2048
_FEW = 1024  # elements that are sorted at once, as are
_EQUAL = 1e-30  # elements that differ by less than this: buckets would not separate them


def add_bias(scores: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """Add to the scores of the given ids (OpenAI's logit_bias; transformers' SequenceBiasLogitsProcessor)."""
    known = [(token, value) for token, value in bias if token < scores.size(-1)]
    if not known:
        return scores
    tokens, values = zip(*known, strict=True)
    return _add(scores, torch.tensor(tokens), torch.tensor(values, dtype=torch.float64))


def mask_tokens(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Set the scores of the given ids to -inf."""
    known = [token for token in tokens if token < scores.size(-1)]
    if not known:
        return scores
    return scores.index_fill(-1, torch.tensor(known, device=scores.device), -math.inf)


def mask_bad_words(scores: Tensor, words: Sequence[Sequence[int]], tokens: Sequence[int]) -> Tensor:
    """Set the score of each word's last id to -inf where the tokens so far end with the word's other ids."""
    return mask_tokens(scores, [word[-1] for word in words if _ends_with(tokens, word[:-1])])


def _ends_with(tokens: Sequence[int], ids: Sequence[int]) -> bool:
    return len(tokens) >= len(ids) and list(tokens[len(tokens) - len(ids) :]) == list(ids)


def keep_tokens(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Set the scores of all other ids to -inf."""
    kept = torch.tensor([token for token in tokens if token < scores.size(-1)], dtype=torch.int64, device=scores.device)
    return torch.full_like(scores, -math.inf).index_copy(-1, kept, scores.index_select(-1, kept))


def suppress(scores: Tensor, ids: Tensor) -> Tensor:
    """`mask_tokens` for ids [ids] int64 that are all in the vocabulary."""
    return scores.index_fill(-1, ids.to(scores.device), -math.inf) if len(ids) else scores


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's penalty (Keskar et al. 2019, arXiv:1909.05858), as in transformers: a score above 0 is divided,
    one below 0 multiplied.

    Args:
        seen: [distinct] int64, every id of the prompt and the output once.
    """
    seen = seen[seen < scores.size(-1)].to(scores.device)
    if penalty == 1 or not len(seen):
        return scores
    penalty = min(max(penalty, TINY), _MAX)  # in float32 it would be 0 or inf, and 0 times inf no number
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


def apply_temperature(scores: Tensor, temperature: float) -> Tensor:
    """Divide by a temperature above 0 (Ackley et al. 1985). Scores of +inf, which an extreme penalty can give, become
    equally likely and all others impossible."""
    best = float(scores.max())
    if best == math.inf:
        scores = torch.where(scores.isposinf(), 0.0, -math.inf)
    elif temperature < COLD or abs(best) > HUGE:  # keep the best score finite; else as transformers does
        scores = scores - best
    return scores / max(temperature, TINY)


def top_k_ids(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best tokens, and of all that tie with the k-th (Fan et al. 2018, arXiv:1805.04833).

    Args:
        scores: [vocabulary].
        k: 1 or above; more than the vocabulary means all of it.

    Returns:
        [k or more] int64, ids in ascending order.
    """
    return (scores >= scores.topk(min(k, len(scores))).values[-1]).nonzero().squeeze(1)


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
    """Mark the elements that come first in ascending order of `keys` (equal ones in the order of their indices), as
    long as `is_in` accepts their cumulative share of the total weight, each element's own weight included.

    Only the elements near the border are sorted: keys are put into buckets, the buckets' weights tell which of them
    contains the border, and that bucket is split in the same way.

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
    """`_lowest_share` with `is_in` applied to the cumulative weight instead of its share."""
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
    """Add values [tokens] in float64 to the scores of distinct tokens; values are clamped to finite ones, because
    inf - inf is not a number."""
    values = values.clamp(-_MAX, _MAX).to(scores.dtype).expand(*scores.shape[:-1], -1)
    return scores.index_add(-1, tokens.to(scores.device), values.to(scores.device))


def nucleus_size(params: SamplingParams, history: TokenHistory) -> float:
    """The top-p of the next token: in the factual nucleus (Lee et al. 2022, arXiv:2206.04624; as in metaseq) it is
    max(omega_bound, top_p * lambda_decay ** (t - 1)) for the t-th token of a sentence."""
    if params.lambda_decay == 1:
        return params.top_p
    before = history.tokens_since(params.sentence_end_tokens)
    return max(params.omega_bound, params.top_p * params.lambda_decay**before)


def _end_tokens(params: SamplingParams, history: TokenHistory) -> list[int]:
    """Ids that would end the text."""
    return [*(() if params.ignore_eos else history.eos), *params.stop_token_ids]


class LogitsProcessor(NamedTuple):
    """One step of the chain.

    Attributes:
        is_active: whether a request's options turn it on; evaluated once per request.
        apply: (scores, options, tokens so far) -> new scores; where `selects` is set, the indices of the scores that
            are kept, so that the processors after it see only those.
        is_batched: `batch_sampler.sample_rows` does the same for many rows.
        keeps_argmax: the best token stays the best one, so that greedy search can do without it.
    """

    is_active: Callable[[SamplingParams], bool]
    apply: Callable[[Tensor, SamplingParams, TokenHistory], Tensor]
    keeps_argmax: bool = False
    selects: bool = False
    is_batched: bool = False


# The order is that of transformers (`GenerationMixin._get_logits_processor`) wherever it has the processor. What was
# set to -inf stays so, hence it does not matter to the result whether a mask comes before a penalty or after it.
# These run in every search: greedy, sampling, beam and contrastive.
PROCESSORS = (
    # FlagAI starts from log-probabilities; the order after it is the same.
    LogitsProcessor(
        lambda p: p.log_probabilities, lambda scores, p, history: scores.log_softmax(-1), keeps_argmax=True
    ),
    # transformers: sequence_bias
    LogitsProcessor(lambda p: bool(p.logit_bias), lambda scores, p, history: add_bias(scores, p.logit_bias)),
    # transformers: repetition_penalty (CTRL), of prompt and output
    LogitsProcessor(
        lambda p: p.repetition_penalty != 1,
        lambda scores, p, history: penalize_repetition(scores, history.distinct(), p.repetition_penalty),
    ),
    # transformers: bad_words_ids of one token
    LogitsProcessor(lambda p: bool(p.banned_tokens), lambda scores, p, history: mask_tokens(scores, p.banned_tokens)),
    # transformers: bad_words_ids
    LogitsProcessor(
        lambda p: bool(p.bad_word_ids),
        lambda scores, p, history: mask_bad_words(scores, p.bad_word_ids, history.tokens),
    ),
    # transformers: begin_suppress_tokens
    LogitsProcessor(
        lambda p: bool(p.begin_suppress_tokens),
        lambda scores, p, history: (
            scores if history.num_output_tokens else mask_tokens(scores, p.begin_suppress_tokens)
        ),
    ),
    # transformers: min_new_tokens; nothing that ends the text
    LogitsProcessor(
        lambda p: p.min_new_tokens > 0,
        lambda scores, p, history: (
            mask_tokens(scores, _end_tokens(p, history)) if history.num_output_tokens < p.min_new_tokens else scores
        ),
    ),
    # transformers: prefix_allowed_tokens_fn; vLLM: allowed_token_ids
    LogitsProcessor(
        lambda p: bool(p.allowed_token_ids), lambda scores, p, history: keep_tokens(scores, p.allowed_token_ids)
    ),
    # OpenAI and vLLM, of the output
    LogitsProcessor(
        lambda p: p.presence_penalty != 0 or p.frequency_penalty != 0,
        lambda scores, p, history: penalize_counts(
            scores, *history.output_counts(), p.presence_penalty, p.frequency_penalty
        ),
    ),
    # metaseq, of the prompt (its alpha_presence_src and alpha_frequency_src)
    LogitsProcessor(
        lambda p: p.prompt_presence_penalty != 0 or p.prompt_frequency_penalty != 0,
        lambda scores, p, history: penalize_counts(
            scores, *history.prompt_counts(), p.prompt_presence_penalty, p.prompt_frequency_penalty
        ),
    ),
    # Kirchenbauer et al.: before the temperature, as in the authors' code; in transformers 5 after the filters
    LogitsProcessor(
        lambda p: p.mark > 0,
        lambda scores, p, history: prefer_green(scores, p, history.tokens),
        is_batched=True,
    ),
)

# These run after PROCESSORS, and only where a token is sampled.
SAMPLING_PROCESSORS = (
    # transformers: temperature
    LogitsProcessor(
        lambda p: p.temperature > 0,
        lambda scores, p, history: apply_temperature(scores, p.temperature),
        is_batched=True,
    ),
    # transformers: top_k; it only selects, because the other tokens would cost time in all that follow
    LogitsProcessor(
        lambda p: p.top_k > 0, lambda scores, p, history: top_k_ids(scores, p.top_k), selects=True, is_batched=True
    ),
    # transformers: top_p; metaseq: the factual nucleus
    LogitsProcessor(
        lambda p: p.top_p < 1 or p.lambda_decay < 1,
        lambda scores, p, history: keep_top_p(scores, nucleus_size(p, history)),
        is_batched=True,
    ),
    # transformers: min_p
    LogitsProcessor(lambda p: p.min_p > 0, lambda scores, p, history: keep_min_p(scores, p.min_p), is_batched=True),
    # transformers: typical_p
    LogitsProcessor(lambda p: p.typical_p < 1, lambda scores, p, history: keep_typical(scores, p.typical_p)),
)


NO_IDS = torch.empty(0, dtype=torch.int64)


class ProcessorChain:
    """The processors that a request's options turn on. Derived once a request, never changed, and free of state: the
    tokens of a sequence are passed in.

    Args:
        suppressed: [ids] int64 that no request may get.

    Attributes:
        params: the request's options.
        processors: those of PROCESSORS that are active.
        sampling_processors: those of SAMPLING_PROCESSORS that are active.
        is_greedy: the best token is taken after `processors`; nothing is sampled.
        is_plain_greedy: the best logit that is not suppressed is the best token, so that no processor needs to run.
    """

    def __init__(self, params: SamplingParams, suppressed: Tensor = NO_IDS) -> None:
        self.params, self.suppressed = params, suppressed
        active = [processor for processor in PROCESSORS if processor.is_active(params)]
        self.processors = tuple(active)
        self.is_greedy = params.is_greedy
        sampling = () if self.is_greedy else SAMPLING_PROCESSORS
        self.sampling_processors = tuple(processor for processor in sampling if processor.is_active(params))
        self.is_plain_greedy = self.is_greedy and all(processor.keeps_argmax for processor in active)
