"""Chooses the search for a request: sampling, beam search or contrastive search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..request import Request
from .beam_search import BeamSearchGroup
from .contrastive_search import ContrastiveSearchGroup
from .sampling_group import SamplingGroup
from .sequences import SequenceGroup


def make_groups(
    request_id: int,
    request: Request,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    suppressed: Tensor,
    *,
    samples_in_step: bool = False,
) -> Iterator[SequenceGroup]:
    """The groups of a request, one after the other: what they have in common can be read off the first.

    Args:
        vocab_size: width of the logits.
        suppressed: [ids] int64 that are never chosen.
        samples_in_step: of SamplingGroup.
    """
    params = request.params
    eos = () if params.ignore_eos else eos_token_ids
    if params.num_beams > 1:
        yield BeamSearchGroup(request_id, request, eos, suppressed)
    elif params.penalty_alpha > 0:
        yield ContrastiveSearchGroup(request_id, request, eos, vocab_size, suppressed)
    else:
        for choice in range(params.num_sampled):
            yield SamplingGroup(request_id, request, eos, choice, suppressed, samples_in_step=samples_in_step)
