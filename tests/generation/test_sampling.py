"""The filters: equal to transformers' logits processors, and to FlagAI's order on log-probabilities."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling import (
    SamplingParams,
    ban,
    choose,
    filtered_scores,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

HISTORY = torch.tensor([3, 5, 5, 7])
LN = math.log


def scores(seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda s: penalize_repetition(s, HISTORY, 1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (lambda s: keep_top_k(s, 7), TopKLogitsWarper(7)),
        (lambda s: keep_top_k(s, 500), TopKLogitsWarper(500)),
        (lambda s: keep_top_p(s, 0.8), TopPLogitsWarper(0.8)),
        (lambda s: keep_top_p(s, 0.01), TopPLogitsWarper(0.01)),
        (lambda s: filtered_scores(s, SamplingParams(temperature=0.6), HISTORY), TemperatureLogitsWarper(0.6)),
    ],
)
def test_each_filter_is_transformers(ours, theirs, seed):
    assert torch.equal(ours(scores(seed)), theirs(HISTORY[None], scores(seed)[None])[0])


def test_all_filters_in_transformers_order():
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3)
    expected = scores()[None]
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
    ):
        expected = processor(HISTORY[None], expected)
    assert torch.equal(filtered_scores(scores(), params, HISTORY), expected[0])


def test_top_k_keeps_ties_and_top_p_the_token_that_crosses():
    kept = torch.isfinite(keep_top_k(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2))
    assert kept.tolist() == [False, True, True, True]
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(keep_top_p(probabilities, 0.7)).tolist() == [True, True, False, False]


def test_flagai_penalizes_log_probabilities_and_bans_the_unknown_token():
    # Probabilities 0.5, 0.25, 0.25; token 0 was seen and is penalised by 2: log 0.5 * 2 = log 0.25.
    logits = torch.tensor([LN(4), LN(2), LN(2), 50.0 - 50.0 - math.inf])
    params = SamplingParams(repetition_penalty=2.0, log_probabilities=True, banned_tokens=(1,))
    result = filtered_scores(logits, params, torch.tensor([0, 0]))
    assert torch.allclose(result, torch.tensor([LN(0.25), -math.inf, LN(0.25), -math.inf]))


def test_banned_tokens_are_never_chosen_even_when_best():
    assert ban(torch.tensor([1.0, 9.0, 2.0]), (1,)).argmax() == 2
    params = SamplingParams(temperature=0, banned_tokens=(1,))
    assert choose(torch.tensor([1.0, 9.0, 2.0]), params, HISTORY[:0], torch.Generator()) == 2


def test_filters_leave_their_input_alone():
    before = scores()
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2, banned_tokens=(1,))
    given = before.clone()
    filtered_scores(given, params, HISTORY)
    assert torch.equal(given, before)


def test_samples_follow_the_distribution():
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    draws = torch.tensor([choose(logits, SamplingParams(), HISTORY, generator) for _ in range(4000)])
    share = torch.bincount(draws, minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)  # four standard deviations


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature is -1, but must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 2}, "top_p is 2, but must be above 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "stop is"),
    ],
)
def test_values_out_of_range_are_named(option, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**option)
