"""The filters: equal to transformers' logits processors, and their order; the choice; the options' ranges."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.logits_processors import ban, keep_min_p, keep_top_p, keep_typical, top_k_ids
from opt_megatron.generation.sampling.sampler import (
    SamplingParams,
    TokenHistory,
    choose,
    distribution,
    draw,
    filtered_scores,
    nucleus_size,
    top_log_probabilities,
)

PROMPT = (3, 5, 5, 7)
EOS = 2
LN = math.log
NEVER = -math.inf


def history(*output: int, prompt: tuple[int, ...] = PROMPT, eos: int | None = EOS) -> TokenHistory:
    result = TokenHistory(prompt, eos)
    for token in output:
        result.append(token)
    return result


def scores(seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Each filter, and all of them in a row


@pytest.mark.parametrize("size", [50, 5000])  # the larger is more than what is sorted at once
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_k": 9000}, TopKLogitsWarper(9000)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
        ({"typical_p": 0.7}, TypicalLogitsWarper(0.7)),
        ({"typical_p": 0.05}, TypicalLogitsWarper(0.05)),
        ({"repetition_penalty": 1.7}, RepetitionPenaltyLogitsProcessor(1.7)),
        ({"repetition_penalty": 0.6}, RepetitionPenaltyLogitsProcessor(0.6)),
        ({"logit_bias": ((4, 2.5), (0, -100.0))}, SequenceBiasLogitsProcessor({(4,): 2.5, (0,): -100.0})),
        ({"banned_tokens": (1, 9)}, NoBadWordsLogitsProcessor([[1], [9]])),
        (
            {"min_new_tokens": 3, "stop_token_ids": (11,)},
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, torch.tensor([EOS, 11])),
        ),
        (
            {"min_new_tokens": 2, "stop_token_ids": (11,)},
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, torch.tensor([EOS, 11])),
        ),
    ],
)
def test_each_filter_is_transformers(options, theirs, seed, size):
    known = history(8, 5)
    theirs = deepcopy(theirs)  # some remember the size of the vocabulary
    expected = theirs(torch.tensor([known.tokens]), scores(seed, size)[None])
    params = SamplingParams(**options)
    assert torch.equal(filtered_scores(scores(seed, size)[None], params, known), expected)
    assert torch.equal(filtered_scores(scores(seed, size), params, known), expected[0])


@pytest.mark.parametrize("seed", range(4))
def test_all_filters_in_transformers_order(seed):
    options = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.8,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    }
    config = GenerationConfig(
        **options, do_sample=True, sequence_bias=[[[7], 4.0], [[EOS], 50.0]], bad_words_ids=[[1]], eos_token_id=EOS
    )
    config._eos_token_tensor = torch.tensor([EOS])
    tiny = OPTConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    chain = OPTForCausalLM(tiny)._get_logits_processor(config, input_ids_seq_length=len(PROMPT))
    assert len(chain) == 9
    known = history(8, 5)
    expected = chain(torch.tensor([known.tokens]), scores(seed, 99)[None])[0]
    params = SamplingParams(**options, logit_bias=((7, 4.0), (EOS, 50.0)), banned_tokens=(1,))
    assert torch.equal(filtered_scores(scores(seed, 99), params, known), expected)
    assert torch.allclose(distribution(scores(seed, 99), params, known), expected.softmax(-1), rtol=1e-5)


def test_presence_and_frequency_penalties_by_their_formula():
    # The prompt holds 3 once, 5 twice; the output 5 three times, 9 once.
    known = history(5, 9, 5, 5, prompt=(3, 5, 5))
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, prompt_presence_penalty=2.0, prompt_frequency_penalty=-1.0
    )
    expected = torch.zeros(10)
    expected[3] = -2.0 + 1
    expected[5] = -0.5 - 3 * 0.25 - 2.0 + 2 * 1
    expected[9] = -0.5 - 0.25
    assert torch.equal(filtered_scores(torch.zeros(10), params, known), expected)


def test_the_factual_nucleus_shrinks_within_a_sentence_and_starts_again_after_it():
    # p_t = max(0.3, 0.8 * 0.5 ** (t - 1)); 4 ends a sentence, also where the prompt holds it.
    params = SamplingParams(top_p=0.8, lambda_decay=0.5, omega_bound=0.3, sentence_end_tokens=(4, 6))
    known, sizes = history(prompt=(4, 1, 1)), []
    for token in (1, 1, 1, 4, 1, 6, 6):
        sizes.append(nucleus_size(params, known))
        known.append(token)
    assert sizes == [0.8, 0.4, 0.3, 0.3, 0.8, 0.4, 0.8]
    # With 0.4 one token is enough, with 0.8 two.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(filtered_scores(logits, params, history())).tolist() == [True, True, False, False]
    assert torch.isfinite(filtered_scores(logits, params, history(1))).tolist() == [True, False, False, False]
    assert nucleus_size(SamplingParams(top_p=0.8, omega_bound=0.9), history(1)) == 0.8  # without a decay it is off


def test_top_k_keeps_ties_and_top_p_the_token_that_crosses():
    assert top_k_ids(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [1, 2, 3]
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(keep_top_p(probabilities, 0.7)).tolist() == [True, True, False, False]


def test_flagai_penalizes_log_probabilities_and_bans_the_unknown_token():
    # Probabilities 0.5, 0.25, 0.25; token 0 was seen and is penalised by 2: log 0.5 * 2 = log 0.25.
    logits = torch.tensor([LN(4), LN(2), LN(2), NEVER])
    params = SamplingParams(repetition_penalty=2.0, log_probabilities=True, banned_tokens=(1,))
    result = filtered_scores(logits, params, history(prompt=(0, 0)))
    assert torch.allclose(result, torch.tensor([LN(0.25), NEVER, LN(0.25), NEVER]))


def test_ids_beyond_the_scores_are_passed_over():
    # A prompt may hold the vocabulary's padding ids, which the scores come without.
    params = SamplingParams(
        repetition_penalty=2,
        presence_penalty=1,
        prompt_presence_penalty=1,
        banned_tokens=(70,),
        logit_bias=((60, 1.0),),
        min_new_tokens=5,
        stop_token_ids=(80,),
    )
    assert torch.equal(filtered_scores(scores(), params, history(55, prompt=(50,), eos=99)), scores())


def test_without_an_end_of_sequence_token_to_wait_for_none_is_held_back():
    params = SamplingParams(min_new_tokens=3, ignore_eos=True)
    assert torch.equal(filtered_scores(scores(), params, history()), scores())
    assert torch.equal(filtered_scores(scores(), SamplingParams(min_new_tokens=3), history(eos=None)), scores())


def test_filters_leave_their_input_alone():
    before = scores()
    params = SamplingParams(
        temperature=0.5,
        top_k=9,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=2,
        presence_penalty=1,
        banned_tokens=(1,),
        logit_bias=((3, 1.0),),
    )
    logits = before.clone()
    filtered_scores(logits, params, history(4))
    distribution(logits, params, history(4))
    choose(logits[None], [(params, history(4), generator())])
    assert torch.equal(logits, before)


# The fast selections against plain sorted ones


def sorted_top_p(row: torch.Tensor, p: float) -> torch.Tensor:
    """transformers' nucleus, with sums in float64."""
    ascending, order = row.sort(stable=True)
    reached = (ascending - ascending[-1]).exp().double().cumsum(0)
    dropped = (reached / reached[-1]).float() <= 1 - p
    dropped[-1] = False
    return row.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), NEVER)


def sorted_typical(row: torch.Tensor, mass: float) -> torch.Tensor:
    """transformers' typical sampling, with sums in float64."""
    normalized = row.double().log_softmax(-1)
    entropy = -(normalized * normalized.exp()).nansum()
    distance = (-normalized - entropy).abs().float()
    ascending, order = distance.sort(stable=True)
    reached = normalized.exp()[order].cumsum(0)
    last = min(int(((reached / reached[-1]).float() < mass).sum()), len(row) - 1)
    return row.masked_fill(distance > ascending[last], NEVER)


def as_scores(kind: str, size: int, seed: int) -> torch.Tensor:
    random = torch.randn(size, generator=generator(seed))
    if kind == "ties":
        random = (random * 2).round()
    elif kind == "peak":
        random[0] += 12
    elif kind == "cluster":  # nearly all in two buckets, which are thrown into buckets again
        random *= 0.001
        random[0], random[-1] = 6, -6
    elif kind == "next to equal":
        random *= 1e-38
    elif kind == "equal":
        random.zero_()
    elif kind == "banned":
        random[torch.rand(size, generator=generator(seed + 1)) < 0.7] = NEVER
        random[-1] = 0.5
    elif kind == "wide":
        random *= 60
    return random


some_scores = st.builds(
    as_scores,
    st.sampled_from(["plain", "ties", "peak", "cluster", "next to equal", "equal", "banned", "wide"]),
    st.sampled_from([1, 2, 7, 60, 1500, 4000]),
    st.integers(0, 10_000),
)
some_p = st.sampled_from([1e-9, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]) | st.floats(0.001, 0.999)


@settings(max_examples=150, deadline=None)
@given(some_scores, some_p)
def test_the_nucleus_and_the_typical_set_are_those_of_a_full_sort(row, p):
    assert torch.equal(keep_top_p(row, p), sorted_top_p(row, p))
    assert torch.equal(keep_typical(row, p), sorted_typical(row, p))


@settings(max_examples=150, deadline=None)
@given(some_scores, some_p, st.integers(0, 70), some_p, some_p, st.sampled_from([0.5, 1.0, 3.0]))
def test_what_is_drawn_from_is_the_softmax_of_filters_that_each_see_the_whole_vocabulary(
    row, top_p, top_k, min_p, typical_p, temperature
):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p / 9, typical_p=typical_p)
    expected = row / temperature
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected[None])[0]
    expected = sorted_typical(keep_min_p(sorted_top_p(expected, top_p), min_p / 9), typical_p)
    assert torch.equal(filtered_scores(row, params, history()), expected)
    result = distribution(row, params, history())
    assert torch.equal(result > 0, expected.softmax(-1) > 0)
    assert torch.allclose(result, expected.softmax(-1), rtol=1e-5)


# The choice


def test_banned_tokens_are_never_chosen_even_when_best():
    assert ban(torch.tensor([1.0, 9.0, 2.0]), (1,)).argmax() == 2
    params = SamplingParams(temperature=0, banned_tokens=(1,))
    assert choose(torch.tensor([[1.0, 9.0, 2.0]]), [(params, history(), generator())]) == [2]


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
    rows = [(SamplingParams(**o), history(n), generator(n)) for n, o in enumerate(options)]
    together = choose(logits, rows)
    alone = []
    for n, (params, known, _) in enumerate(rows):
        alone += choose(logits[n : n + 1], [(params, known, generator(n))])
        if params.temperature:  # and so does who draws from the distribution (speculative decoding)
            assert draw(distribution(logits[n], params, known), generator(n)) == together[n]
        else:
            assert distribution(logits[n], params, known).tolist() == [float(i == together[n]) for i in range(400)]
    assert together == alone
    assert together[0] == logits[0].argmax()


def test_of_equal_best_logits_greedy_takes_the_first():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    for options in ({}, {"banned_tokens": (0,)}):
        assert choose(logits, [(SamplingParams(temperature=0, **options), history(), generator())]) == [1]


def test_samples_follow_the_distribution():
    random, logits = generator(1), torch.tensor([[0.5, 0.3, 0.2]]).log()
    draws = torch.tensor([choose(logits, [(SamplingParams(), history(), random)])[0] for _ in range(4000)])
    share = torch.bincount(draws, minlength=3) / 4000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)  # four standard deviations


def test_equal_seeds_give_equal_samples_and_one_number_is_taken_for_each():
    logits, params = scores()[None], SamplingParams(temperature=2.0)
    first, again, other = generator(5), generator(5), generator(6)
    choices = [[choose(logits, [(params, history(), g)])[0] for _ in range(20)] for g in (first, again, other)]
    assert choices[0] == choices[1] != choices[2]
    counted = generator(5)
    for _ in range(20):
        torch.rand((), dtype=torch.float64, generator=counted)
    assert torch.equal(first.get_state(), counted.get_state())


class FixedShare:
    """Stands for torch.rand: gives this share."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, *_: object, **__: object) -> torch.Tensor:
        return torch.tensor(self.share, dtype=torch.float64)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4999999, 0.5, 0.999999, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1.1, 1e-30, 3.0])
def test_a_token_with_probability_0_is_never_drawn(monkeypatch, share, scale):
    monkeypatch.setattr(torch, "rand", FixedShare(share))
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 1e-30, 0.0, 0.0]) * scale
    token = draw(probabilities, generator())
    assert probabilities[token] > 0
    assert token == (1 if share < 0.25 else 3 if share < 0.5 else 4)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}])
def test_a_row_without_a_possible_token_is_refused_and_one_with_infinite_scores_is_not(options):
    possible = SamplingParams(repetition_penalty=1e-300, min_p=0.1, **options)
    logits = torch.tensor([1.0, 2.0, NEVER, 3e38, 1.0])
    known = history(prompt=(2, 3))
    assert not filtered_scores(logits, possible, known).isnan().any()
    assert choose(logits[None], [(possible, known, generator())]) == [3]
    impossible = SamplingParams(banned_tokens=tuple(range(5)), **options)
    assert not filtered_scores(logits, impossible, known).isnan().any()
    for params, given_logits in ((impossible, logits), (possible, logits * math.nan)):
        with pytest.raises(UserError, match="no token is possible"):
            choose(given_logits[None], [(params, known, generator())])
        with pytest.raises(UserError, match="no token is possible"):
            distribution(given_logits, params, known)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4])
def test_a_temperature_next_to_0_is_greedy(temperature):
    params = SamplingParams(temperature=temperature)
    assert choose(scores()[None], [(params, history(), generator())]) == [int(scores().argmax())]


def test_top_log_probabilities_are_of_the_raw_logits():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log() + 3
    first, second = top_log_probabilities(logits, [2, 2], 2)
    assert first[0] == pytest.approx(LN(0.25)) and second[0] == pytest.approx(LN(0.7))
    assert [token for token, _ in first[1]] == [0, 1] and [token for token, _ in second[1]] == [2, 1]
    assert [value for _, value in second[1]] == pytest.approx([LN(0.7), LN(0.2)])
    assert top_log_probabilities(logits, [0, 1], 0)[1] == (pytest.approx(LN(0.2)), ())
    assert len(top_log_probabilities(logits, [0, 1], 9)[0][1]) == 3


# The history


def as_lists(known: TokenHistory) -> tuple[object, ...]:
    counts = dict(zip(*(part.tolist() for part in known.output_counts()), strict=True))
    return known.tokens, known.output, sorted(known.distinct().tolist()), counts, known.length_of_sentence({4})


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.data())
def test_a_truncated_history_is_one_that_never_went_further(prompt, output, data):
    known = history(*output, prompt=tuple(prompt))
    kept = data.draw(st.integers(0, len(output)))
    other = known.copy()
    other.truncate(kept)
    assert as_lists(other) == as_lists(history(*output[:kept], prompt=tuple(prompt)))
    other.append(1)
    assert as_lists(known) == as_lists(history(*output, prompt=tuple(prompt)))  # the copy went alone
    assert as_lists(known)[2] == sorted({*prompt, *output})


# The options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature is -1, but must be 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 2}, "top_p is 2, but must be above 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -5}, "top_k is -5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"max_new_tokens": -1, "echo": True}, "max_new_tokens is -1, but must be at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9, but must be from 0 to .* 8"),
        ({"stop": ("a", "")}, "stop is"),
        ({"min_p": 1.5}, "min_p is 1.5, but must be from 0"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"typical_p": 0}, "typical_p is 0"),
        ({"omega_bound": -0.1}, "omega_bound is -0.1"),
        ({"lambda_decay": 0}, "lambda_decay is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf, but must be a finite number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"prompt_presence_penalty": math.inf}, "prompt_presence_penalty is inf"),
        ({"prompt_frequency_penalty": math.inf}, "prompt_frequency_penalty is inf"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"penalty_alpha": 2, "top_k": 4}, "penalty_alpha is 2"),
        ({"banned_tokens": (3, -1)}, "banned_tokens is .* ids, which are 0 or above"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is"),
        ({"sentence_end_tokens": (-1,)}, "sentence_end_tokens is"),
        ({"logit_bias": ((-1, 2.0),)}, "logit_bias is .* different ids"),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias is .* different ids"),
        ({"logit_bias": ((1, -math.inf),)}, "logit_bias is .*use banned_tokens"),
        ({"logprobs": 101}, "logprobs is 101, but must be none, or from 0 .* to 100"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"n": 0}, "n is 0, but must be from 1 to 100000"),
        ({"n": 2.0}, "n is 2.0, but must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, but must be a whole number"),
        ({"temperature": "1"}, "temperature is '1', but must be a number"),
        ({"temperature": 10**400}, "which is more than a number can be"),
        ({"echo": 1}, "echo is 1, but must be true or false"),
        ({"stop": [1]}, "stop is .1., but must be a string or a list of strings"),
        ({"stop_token_ids": [True]}, "stop_token_ids is .True., but must be a list of ids"),
        ({"stop_token_ids": "5"}, "stop_token_ids is .5., but must be a list of ids"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5, but must be a list of ids"),
        ({"logit_bias": [1]}, "logit_bias is .1., but must be ids with a number each"),
        ({"n": 3, "best_of": 2}, "best_of is 2, but must be at least n, which is 3"),
        ({"n": 2, "temperature": 0}, "n is 2, but must be 1 at temperature 0"),
        ({"best_of": 2, "temperature": 0}, "best_of is 2, but must be 1 at temperature 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature is 0.5, but must be 0 or 1 in a beam search"),
        ({"num_beams": 2, "n": 3}, "n is 3, but must be at most num_beams, which is 2"),
        ({"num_beams": 2, "top_k": 5}, r"top_k is 5, but has no meaning in a beam search \(num_beams is 2\)"),
        ({"num_beams": 2, "top_p": 0.5}, "top_p is 0.5, but has no meaning in a beam search"),
        ({"num_beams": 2, "min_p": 0.5}, "min_p is 0.5, but has no meaning"),
        ({"num_beams": 2, "typical_p": 0.5}, "typical_p is 0.5, but has no meaning"),
        ({"num_beams": 2, "lambda_decay": 0.5}, "lambda_decay is 0.5, but has no meaning"),
        ({"num_beams": 2, "penalty_alpha": 0.5}, "penalty_alpha is 0.5, but has no meaning"),
        ({"num_beams": 2, "best_of": 3}, "best_of is 3, but has no meaning"),
        ({"penalty_alpha": 0.6}, "top_k is 0, but must be from 2 to 1024 in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "temperature": 0}, "temperature is 0, .* in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "top_p": 0.9}, "top_p is 0.9, .* in a contrastive search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "n": 2}, "n is 2, .* in a contrastive search"),
        ({"stop_regex": ("a(",)}, r"stop_regex 'a\(' is not a regular expression: missing \) at position 2"),
        ({"stop_regex": ("x*",)}, r"stop_regex 'x\*' matches the empty string"),
    ],
)
def test_values_out_of_range_are_named(option, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**option)


def test_what_is_allowed_together():
    SamplingParams(max_new_tokens=0, echo=True, logprobs=0)
    SamplingParams(num_beams=4, n=4, temperature=0, length_penalty=-1.0, repetition_penalty=1.2)
    SamplingParams(penalty_alpha=0.6, top_k=4)
    SamplingParams(n=2, best_of=5)


def test_plain_greedy_is_what_needs_only_the_best_logit():
    assert SamplingParams(temperature=0, top_k=5, top_p=0.5, stop=("a",)).is_plain_greedy
    for option in (
        {"temperature": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"prompt_presence_penalty": 0.1},
        {"prompt_frequency_penalty": 0.1},
        {"banned_tokens": (1,)},
        {"logit_bias": ((1, 1.0),)},
        {"min_new_tokens": 1},
        {"num_beams": 2},
        {"logprobs": 0},
    ):
        assert not SamplingParams(**{"temperature": 0, **option}).is_plain_greedy, option


def test_values_come_in_all_kinds():
    given = SamplingParams(
        seed=np.int64(7), temperature=np.float32(0.5), stop="ab", stop_token_ids=[np.int32(4)], logit_bias={5: -1}
    )
    assert given == SamplingParams(seed=7, temperature=0.5, stop=("ab",), stop_token_ids=(4,), logit_bias=((5, -1),))
    assert type(given.seed) is int and type(given.temperature) is float and type(given.stop_token_ids[0]) is int
