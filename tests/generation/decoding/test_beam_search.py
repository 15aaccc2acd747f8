"""Beam search against transformers'."""

import math

import pytest
import rank_jobs
import torch
from factory import random_model, save

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.decoding.beam_search import BeamSearch
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.tokenizer import OPTTokenizer

EOS = 2
PROMPTS = [(5,), (2, 7, 9, 20), (11, 4, 4, 8, 3, 19, 6, 15), (2, 13)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of so few tokens that beams end."""
    model = random_model(scale=0.1, vocab_size=24, num_hidden_layers=3)
    return save(model, tmp_path_factory.mktemp("beams")), model


def oracle(model, prompt, params: SamplingParams, ends=(EOS,)) -> list[tuple[int, ...]]:
    ids = torch.tensor([prompt])
    rows = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_new_tokens,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        repetition_penalty=params.repetition_penalty,
        min_new_tokens=params.min_new_tokens or None,
        do_sample=False,
        eos_token_id=None if params.ignore_eos else list(ends),
        pad_token_id=1,
    )
    ends = () if params.ignore_eos else ends
    return [without_padding(row, ends) for row in rows[:, len(prompt) :].tolist()]


def without_padding(tokens: list[int], ends) -> tuple[int, ...]:
    end = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:end])


def beams(new: int = 20, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, n=options["num_beams"], **options)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 4])
def test_beams_are_the_oracles(small, alone, num_beams, length_penalty, early_stopping):
    directory, model = small
    engine = Engine(load_model(directory, None, alone), alone)
    params = beams(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
    completions = engine.complete([Request(prompt, params) for prompt in PROMPTS])
    expected = [beam for prompt in PROMPTS for beam in oracle(model, prompt, params)]
    assert [c.tokens for c in completions] == expected
    assert [(c.request, c.choice) for c in completions] == [(r, n) for r in range(4) for n in range(num_beams)]
    assert [c.finish_reason for c in completions] == ["stop" if t[-1] == EOS else "length" for t in expected]


def test_beams_of_the_small_model_end_at_many_lengths(small):
    params = beams(num_beams=4, early_stopping=True)
    assert len({len(beam) for prompt in PROMPTS for beam in oracle(small[1], prompt, params)}) >= 6


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8, "length_penalty": 2.0},
        {"min_new_tokens": 6},
        {"stop_token_ids": (9, 14)},  # three tokens that end a beam, so that more candidates are looked at
        {"ignore_eos": True},
        {"new": 1},
    ],
)
def test_other_options(small, alone, options):
    directory, model = small
    params = beams(num_beams=3, **options)
    completions = Engine(load_model(directory, None, alone), alone).complete([Request(p, params) for p in PROMPTS])
    ends = (EOS, *params.stop_token_ids)
    assert [c.tokens for c in completions] == [b for p in PROMPTS for b in oracle(model, p, params, ends)]


def test_the_best_few_are_returned_and_text_is_theirs(models, alone):
    directory, model = models["story"]
    tokenizer = OPTTokenizer.from_directory(directory)
    engine = Engine(load_model(directory, None, alone), alone, prefill_chunk_size=2)
    prompt = tuple(tokenizer.encode("The king had a daughter"))
    params = SamplingParams(max_new_tokens=20, num_beams=4, n=2)
    completions = engine.complete([Request(prompt, params, tokenizer.stream)])
    assert [c.tokens for c in completions] == oracle(model, prompt, params)
    assert [c.text for c in completions] == [tokenizer.decode(c.tokens) for c in completions]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3)])
def test_beams_over_ranks(small, ranks, tp, pp):
    directory, model = small
    params = beams(num_beams=3, early_stopping=True)
    requests = [Request(prompt, params) for prompt in PROMPTS]
    for completions in ranks(tp * pp).run(rank_jobs.generate, directory, tp, pp, requests):
        assert [c.tokens for c in completions] == [b for p in PROMPTS for b in oracle(model, p, params)]


def test_impossible_tokens_start_no_beam():
    search = BeamSearch(SamplingParams(max_new_tokens=2, num_beams=3), [])
    assert [step.token for step in search.advance(torch.tensor([[-1.0, -math.inf, -2.0, -math.inf]]))] == [0, 2]
    assert len(search.advance(torch.full((2, 4), -1.0))) == 0
    assert search.is_done and len(search.best()) == 1
