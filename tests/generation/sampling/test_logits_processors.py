"""The logits processors: equal to transformers', in its order, and the fast selections equal to sorted ones."""

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_inputs import EOS, NEVER, PROMPT, choose, filtered, generator, history, probabilities, scores
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from opt_megatron.generation.sampling.logits_processors import (
    ProcessorChain,
    keep_min_p,
    keep_top_p,
    keep_typical,
    nucleus_size,
    top_k_ids,
)
from opt_megatron.generation.sampling.sampling_params import SamplingParams

LN = math.log

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
            {"bad_word_ids": ((8, 5, 3), (5, 7), (4, 6), (2,))},
            NoBadWordsLogitsProcessor([[8, 5, 3], [5, 7], [4, 6], [2]]),
        ),
        (
            {"bad_word_ids": ((*PROMPT, 8, 5, 6), (0, *PROMPT, 8, 5, 7))},
            NoBadWordsLogitsProcessor([[8, 5, 6]]),  # transformers 4 ignores a word of which all is there but the end
        ),
        (
            {"allowed_token_ids": (3, 48, 9)},
            PrefixConstrainedLogitsProcessor(lambda batch, ids: [3, 48, 9], num_beams=1),
        ),
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
    assert torch.equal(filtered(scores(seed, size)[None], params, known), expected)
    assert torch.equal(filtered(scores(seed, size), params, known), expected[0])


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
    assert torch.equal(filtered(scores(seed, 99), params, known), expected)
    assert torch.allclose(probabilities(scores(seed, 99), params, known), expected.softmax(-1), rtol=1e-5)


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
    assert torch.equal(filtered(torch.zeros(10), params, known), expected)


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
    assert torch.isfinite(filtered(logits, params, history())).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert torch.isfinite(filtered(logits, params, history(1))).tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert nucleus_size(SamplingParams(top_p=0.8, omega_bound=0.9), history(1)) == 0.8  # without a decay it is off


def test_top_k_keeps_ties_and_top_p_the_token_that_crosses():
    assert top_k_ids(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [1, 2, 3]
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert torch.isfinite(keep_top_p(probabilities, 0.7)).tolist() == [True, True, False, False]


def test_flagai_penalizes_log_probabilities_and_bans_the_unknown_token():
    # Probabilities 0.5, 0.25, 0.25; token 0 was seen and is penalised by 2: log 0.5 * 2 = log 0.25.
    logits = torch.tensor([LN(4), LN(2), LN(2), NEVER])
    params = SamplingParams(repetition_penalty=2.0, log_probabilities=True, banned_tokens=(1,))
    result = filtered(logits, params, history(prompt=(0, 0)))
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
    assert torch.equal(filtered(scores(), params, history(55, prompt=(50,), eos=99)), scores())


def test_without_an_end_of_sequence_token_to_wait_for_none_is_held_back():
    params = SamplingParams(min_new_tokens=3, ignore_eos=True)
    assert torch.equal(filtered(scores(), params, history()), scores())
    assert torch.equal(filtered(scores(), SamplingParams(min_new_tokens=3), history(eos=None)), scores())


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
    filtered(logits, params, history(4))
    probabilities(logits, params, history(4))
    choose(logits, params, history(4))
    assert torch.equal(logits, before)


def test_plain_greedy_is_what_needs_only_the_best_logit():
    assert ProcessorChain(SamplingParams(temperature=0, top_k=5, top_p=0.5, stop=("a",))).is_plain_greedy
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
    ):
        assert not ProcessorChain(SamplingParams(**{"temperature": 0, **option})).is_plain_greedy, option


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
    assert torch.equal(filtered(row, params, history()), expected)
    result = probabilities(row, params, history())
    assert torch.equal(result > 0, expected.softmax(-1) > 0)
    assert torch.allclose(result, expected.softmax(-1), rtol=1e-5)
