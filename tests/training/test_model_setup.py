"""Which random numbers the ranks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import training_jobs as jobs
from ranks import RankPool


def test_ranks_agree_on_hidden_dropout_and_differ_in_their_heads(ranks: Callable[[int], RankPool]) -> None:
    (first, own, later), (first_2, own_2, later_2) = ranks(2).run(jobs.dropped, 2)
    assert torch.equal(first, first_2)
    assert torch.equal(later, later_2)
    assert not torch.equal(own, own_2)
    (first, own, _), (first_2, own_2, _) = ranks(2).run(jobs.dropped, 1)  # data parallel
    assert not torch.equal(first, first_2)
    assert not torch.equal(own, own_2)
