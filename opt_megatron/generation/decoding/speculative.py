"""Speculative decoding: the acceptance of proposed tokens, which changes nothing about what is generated.

Decoding one token reads all weights; verifying five proposed ones in one step reads them once. Greedy output is the
same as without proposals; sampled output follows the same distribution, though with other random numbers. What makes
the proposals is in `drafts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..sampling.random_numbers import Purpose, RandomNumbers
from ..sampling.sampler import sample_token


@dataclass
class Proposal:
    """Proposed tokens, and the distribution [V] that each was sampled from (None: it was certain)."""

    tokens: list[int] = field(default_factory=list)
    distributions: list[Tensor | None] = field(default_factory=list)


def verify_token(
    target: Tensor, proposed: int, source: Tensor | None, numbers: RandomNumbers, position: int
) -> tuple[int, bool]:
    """One step of speculative sampling (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1).

    A proposal sampled from q is accepted with probability min(1, p/q); otherwise the token is sampled from the
    positive part of p - q. Whatever q is, the resulting token follows p.

    Args:
        target: p [V], the model's distribution after all processors.
        source: q [V]; None if the proposal was certain.
        numbers, position: the random numbers of the sequence, and where in it the token comes.

    Returns:
        the token, and whether it is the accepted proposal.
    """
    ratio = target[proposed].double() / (1.0 if source is None else source[proposed].double())
    if numbers.at(position, Purpose.ACCEPT) < ratio:
        return proposed, True
    rest = target.clone()
    if source is None:
        rest[proposed] = 0
    else:
        rest = (rest - source).clamp_(min=0)
    # p and q may differ by rounding alone; then p itself is the answer.
    rest = rest / rest.sum() if rest.sum() > 0 else target
    return sample_token(rest, numbers.at(position, Purpose.RESIDUAL)), False
