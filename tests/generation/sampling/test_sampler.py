"""The sampler: the choice of a token, and the log-probabilities that are reported."""

import math

import pytest
import torch
from sampling_inputs import NEVER, choose, filtered, history, probabilities, scores

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.logits_processors import ProcessorChain, mask_tokens
from opt_megatron.generation.sampling.random_numbers import RandomNumbers
from opt_megatron.generation.sampling.sampler import (
    SamplerState,
    choose_tokens,
    sample_token,
    top_log_probabilities,
    vocab_ranks,
)
from opt_megatron.generation.sampling.sampling_params import SamplingParams

LN = math.log


def test_banned_tokens_are_never_chosen_even_when_best():
    assert mask_tokens(torch.tensor([1.0, 9.0, 2.0]), (1,)).argmax() == 2
    params = SamplingParams(temperature=0, banned_tokens=(1,))
    assert choose(torch.tensor([1.0, 9.0, 2.0]), params, history()) == 2


def test_a_batch_of_different_rows_chooses_what_each_would_alone():
    options = [
        {"temperature": 0},
        {"top_k": 20},
        {"temperature": 0, "repetition_penalty": 5.0},
        {"temperature": 3.0},
        {"temperature": 0},
        {"top_p": 0.9, "temperature": 2.0},
        {"temperature": 0.5, "min_p": 0.1, "typical_p": 0.9},
    ]
    logits = torch.stack([scores(seed, 400) for seed in range(len(options))])
    rows = [(SamplingParams(**o), history(n)) for n, o in enumerate(options)]
    states = [SamplerState(ProcessorChain(params), known, RandomNumbers(n)) for n, (params, known) in enumerate(rows)]
    together = choose_tokens(list(logits), states)
    alone = []
    for n, (params, known) in enumerate(rows):
        alone.append(choose(logits[n], params, known, n))
        if params.temperature:  # and so does who draws from the distribution (speculative decoding)
            number = RandomNumbers(n).at(len(known.tokens))
            assert sample_token(probabilities(logits[n], params, known), number) == together[n]
        else:
            assert probabilities(logits[n], params, known).tolist() == [float(i == together[n]) for i in range(400)]
    assert together == alone
    assert together[0] == logits[0].argmax()


def test_of_equal_best_logits_greedy_takes_the_first():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    for options in ({}, {"banned_tokens": (0,)}):
        assert choose(logits, SamplingParams(temperature=0, **options), history()) == 1


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    draws = torch.tensor([choose(logits, SamplingParams(), history(), seed) for seed in range(4000)])
    share = torch.bincount(draws, minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)  # four standard deviations


def test_a_sample_depends_on_the_seed_and_on_its_position_alone():
    logits, params = scores(), SamplingParams(temperature=2.0)
    choices = [[choose(logits, params, history(*range(n)), seed) for n in range(20)] for seed in (5, 5, 6)]
    assert choices[0] == choices[1] != choices[2]
    assert len(set(choices[0])) > 5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4999999, 0.5, 0.999999, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1.1, 1e-30, 3.0])
def test_a_token_with_probability_0_is_never_drawn(share, scale):
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 1e-30, 0.0, 0.0]) * scale
    token = sample_token(probabilities, share)
    assert probabilities[token] > 0
    assert token == (1 if share < 0.25 else 3 if share < 0.5 else 4)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}])
def test_a_row_without_a_possible_token_is_refused_and_one_with_infinite_scores_is_not(options):
    possible = SamplingParams(repetition_penalty=1e-300, min_p=0.1, **options)
    logits = torch.tensor([1.0, 2.0, NEVER, 3e38, 1.0])
    known = history(prompt=(2, 3))
    assert not filtered(logits, possible, known).isnan().any()
    assert choose(logits, possible, known) == 3
    impossible = SamplingParams(banned_tokens=tuple(range(5)), **options)
    assert not filtered(logits, impossible, known).isnan().any()
    for params, given_logits in ((impossible, logits), (possible, logits * math.nan)):
        with pytest.raises(UserError, match="no token is possible"):
            choose(given_logits, params, known)
        with pytest.raises(UserError, match="no token is possible"):
            probabilities(given_logits, params, known)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4])
def test_a_temperature_next_to_0_is_greedy(temperature):
    params = SamplingParams(temperature=temperature)
    assert choose(scores(), params, history()) == int(scores().argmax())


def test_top_log_probabilities_are_of_the_raw_logits():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log() + 3
    first, second = top_log_probabilities(logits, [2, 2], 2)
    assert first[0] == pytest.approx(LN(0.25)) and second[0] == pytest.approx(LN(0.7))
    assert [token for token, _ in first[1]] == [0, 1] and [token for token, _ in second[1]] == [2, 1]
    assert [value for _, value in second[1]] == pytest.approx([LN(0.7), LN(0.2)])
    assert top_log_probabilities(logits, [0, 1], 0)[1] == (pytest.approx(LN(0.2)), ())
    assert len(top_log_probabilities(logits, [0, 1], 9)[0][1]) == 3
    assert vocab_ranks(logits, [0, 1]) == [1, 2] and vocab_ranks(logits, [2, 0]) == [
        3,
        3,
    ]  # of equal ones the last place
    ((_, given),) = top_log_probabilities(logits[1:], [2], 2, (1, 0))
    assert given == ((1, pytest.approx(LN(0.2))), (0, pytest.approx(LN(0.1))))


def test_an_error_of_one_sequence_leaves_the_others_their_tokens():
    impossible = SamplingParams(banned_tokens=tuple(range(50)))
    states = [
        SamplerState(ProcessorChain(params), history(), RandomNumbers(n))
        for n, params in enumerate([SamplingParams(), impossible, SamplingParams()])
    ]
    first, error, last = choose_tokens([scores()] * 3, states)
    assert isinstance(error, UserError) and "no token is possible" in str(error)
    assert [first, last] == [choose(scores(), SamplingParams(), history(), n) for n in (0, 2)]
