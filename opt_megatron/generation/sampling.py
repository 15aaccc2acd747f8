"""From logits to a token: one pure function per filter, and the order in which they are applied.

All filters take scores [..., vocabulary] in float32 and return new ones; a token that may not be chosen
has the score -inf. The order is transformers': repetition penalty, temperature, top-k, top-p. FlagAI's
differs only in that it begins with log-probabilities (`SamplingParams.log_probabilities`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

_COLD = 1e-3


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    Attributes:
        max_new_tokens: at most this many tokens are generated.
        temperature: divides the scores; 0 means greedy.
        top_k: keep the k best tokens, and those that tie with the last of them; 0 keeps all.
        top_p: keep the best tokens until their probabilities reach p, the one that crosses it included.
        repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely.
        seed: of this request's own generator; equal seeds and prompts give equal text.
        stop: strings that end the continuation and are cut off it.
        ignore_eos: go on after an end-of-sequence token.
        log_probabilities: apply the penalty to log-probabilities, as FlagAI does, instead of to logits.
        banned_tokens: ids that are never chosen.

    Raises:
        UserError: a value is out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    log_probabilities: bool = False
    banned_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        finite = math.isfinite(self.temperature)
        _check(finite and self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or above")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or above")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        finite = math.isfinite(self.repetition_penalty)
        _check(finite and self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        _check(all(self.stop), "stop", self.stop, "made of strings that are not empty")

    @property
    def is_plain_greedy(self) -> bool:
        """The choice is the best logit, with nothing applied before."""
        return self.temperature == 0 and self.repetition_penalty == 1 and not self.banned_tokens


def choose(logits: Tensor, params: SamplingParams, history: Tensor, generator: torch.Generator) -> int:
    """Choose the next token.

    Args:
        logits: [vocabulary], float32 on the CPU, without the vocabulary's padding rows.
        history: [tokens] int64, the prompt and what was generated so far.
        generator: of the CPU; drawn from once, and not at all when greedy.
    """
    scores = filtered_scores(logits, params, history)
    if params.temperature == 0:
        return int(scores.argmax())
    if torch.isposinf(scores).any():  # an extreme penalty: what it has made infinitely likely
        scores = torch.zeros_like(scores).masked_fill(~torch.isposinf(scores), -math.inf)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def filtered_scores(logits: Tensor, params: SamplingParams, history: Tensor) -> Tensor:
    """All filters in their order; the softmax of the result is the distribution that is sampled."""
    scores = logits.log_softmax(-1) if params.log_probabilities else logits
    scores = ban(scores, params.banned_tokens)
    scores = penalize_repetition(scores, history, params.repetition_penalty)
    if params.temperature == 0:
        return scores
    if params.temperature < _COLD:  # so that dividing leaves the best score finite; elsewhere as transformers does
        scores = scores - scores.max()
    scores = scores / params.temperature
    scores = keep_top_k(scores, params.top_k)
    return keep_top_p(scores, params.top_p)


def ban(scores: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Make the given ids impossible."""
    if not tokens:
        return scores
    return scores.index_fill(-1, torch.tensor(tokens, device=scores.device), -math.inf)


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """CTRL's penalty (Keskar et al. 2019, arXiv:1909.05858), as in transformers: a score above 0 is divided,
    one below 0 multiplied, once for every distinct token of `history` [tokens]."""
    if penalty == 1:
        return scores
    seen = history.unique()
    values = scores.index_select(-1, seen)
    return scores.index_copy(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k best tokens and all that tie with the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    if k == 0 or k >= scores.size(-1):
        return scores
    threshold = scores.topk(k).values[..., -1:]
    return scores.masked_fill(scores < threshold, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2019, arXiv:1904.09751): drop the least likely tokens whose probabilities
    together are at most 1 - p; the best token always stays."""
    if p == 1:
        return scores
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - p
    dropped[..., -1] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}, but must be {wanted}")
