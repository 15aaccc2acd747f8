"""The engine against transformers' greedy search, at every layout, alone and in a batch."""

import re
from dataclasses import replace

import pytest
import rank_jobs
import torch
from factory import divides, oracle_greedy, prompts_for, random_model, save
from transformers.generation import WatermarkingConfig

from opt_megatron.api import OPT
from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request, check_request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.tokenizer import OPTTokenizer

LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)]
GREEDY_200 = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def oracle_200(models):
    """200 greedy tokens of transformers for two prompts of each model."""
    return {
        name: [oracle_greedy(model, list(prompt), 200) for prompt in prompts_for(model)[:2]]
        for name, (_, model) in models.items()
    }


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "story"])
def test_greedy_tokens_are_the_oracles(models, ranks, oracle_200, name, tp, pp):
    directory, model = models[name]
    if not divides(model, tp, pp):
        pytest.skip("the layout does not divide this model")
    count = 200 if tp == pp else 80  # both take more than one block of the cache
    params = replace(GREEDY_200, max_new_tokens=count)
    requests = [Request(prompt, params) for prompt in prompts_for(model)[:2]]
    for completions in ranks(tp * pp).run(rank_jobs.generate, directory, tp, pp, requests):
        assert [completion.tokens for completion in completions] == [tokens[:count] for tokens in oracle_200[name]]


@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "story"])
def test_eight_unequal_prompts_give_what_each_gives_alone(models, alone, name, max_batch_size):
    directory, model = models[name]
    engine = Engine(load_model(directory, None, alone), alone, max_batch_size=max_batch_size)
    lengths = (30, 12, 25, 7, 30, 3, 18, 26)  # requests leave the batch, and others join it, at different times
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=n, temperature=0, ignore_eos=True))
        for prompt, n in zip(prompts_for(model), lengths, strict=True)
    ]
    batched = [completion.tokens for completion in engine.complete(requests)]
    assert batched == [engine.complete([request])[0].tokens for request in requests]
    assert batched == [oracle_greedy(model, list(r.prompt), n) for r, n in zip(requests, lengths, strict=True)]


@pytest.mark.parametrize("chunk", [1, 3, 16, 17])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_prompts_in_pieces_give_the_oracles_tokens(models, alone, name, chunk):
    directory, model = models[name]
    engine = Engine(load_model(directory, None, alone), alone, prefill_chunk_size=chunk)
    base = prompts_for(model)[1]
    prompts = [base, (*base[:20], 7), *prompts_for(model)]  # three begin alike
    requests = [Request(prompt, replace(GREEDY_200, max_new_tokens=12)) for prompt in prompts]
    expected = [oracle_greedy(model, list(request.prompt), 12) for request in requests]
    assert [completion.tokens for completion in engine.complete(requests)] == expected


@pytest.mark.parametrize("name", ["pre-norm", "story"])
def test_probabilities_are_the_oracles(models, alone, name):
    directory, model = models[name]
    engine = Engine(load_model(directory, None, alone), alone)
    prompts = prompts_for(model)[:3]
    options = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3}  # which change no probability
    params = SamplingParams(max_new_tokens=12, logprobs=5, echo=True, ignore_eos=True, **options)
    for prompt, completion in zip(prompts, engine.complete([Request(p, params) for p in prompts]), strict=True):
        tokens = [*prompt, *completion.tokens]
        with torch.no_grad():
            scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[:-1]
        first, *others = completion.prompt_events
        assert (first.token, first.logprob, first.top_logprobs) == (prompt[0], None, ())
        assert tuple(event.token for event in completion.prompt_events) == prompt
        own = torch.tensor([*(event.logprob for event in others), *completion.logprobs])
        assert (own - scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]).abs().max() <= 1e-4
        top = [*(event.top_logprobs for event in others), *completion.top_logprobs]
        best = scores.topk(5)
        assert [[token for token, _ in row] for row in top] == best.indices.tolist()
        assert (torch.tensor([[value for _, value in row] for row in top]) - best.values).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "story"])
def test_probabilities_in_half_precision_are_near_the_oracles(models, alone, name, dtype):
    directory, model = models[name]
    engine = Engine(load_model(directory, None, alone, dtype), alone, prefill_chunk_size=11)
    params = SamplingParams(max_new_tokens=20, temperature=0, logprobs=0, echo=True, ignore_eos=True)
    (done,) = engine.complete([Request(prompts_for(model)[1], params)])
    tokens = [event.token for event in done.prompt_events] + list(done.tokens)
    ours = torch.tensor([*(event.logprob for event in done.prompt_events[1:]), *done.logprobs])
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[:-1]
    error = (ours - scores.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]).abs().mean() / scores.std()
    assert error < (0.005 if dtype == "float16" else 0.05)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_prompt_can_be_scored_alone(models, ranks, tp, pp):
    directory, model = models["pre-norm"]
    params = SamplingParams(max_new_tokens=0, echo=True, logprobs=0)
    prompts = [*prompts_for(model), (5,) * 256]  # the last one takes every position
    requests = [Request(prompt, params) for prompt in prompts]
    for completions in ranks(tp * pp).run(rank_jobs.generate, directory, tp, pp, requests):
        assert [(c.tokens, c.text, c.finish_reason) for c in completions] == [((), "", "length")] * 9
        for prompt, completion in zip(prompts, completions, strict=True):
            with torch.no_grad():
                scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            first, *scored = [event.logprob for event in completion.prompt_events]
            expected = scores[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            assert first is None and len(scored) == len(prompt) - 1
            assert torch.allclose(torch.tensor(scored), expected, atol=1e-4)


def test_cached_equals_uncached(models, alone):
    directory, model = models["pre-norm"]
    ours = load_model(directory, None, alone)
    tokens = list(prompts_for(model)[0])
    for _ in range(40):
        with torch.no_grad():
            tokens.append(int(ours(torch.tensor([tokens]))[0, -1].argmax()))
    request = Request(prompts_for(model)[0], SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True))
    assert Engine(ours, alone).complete([request])[0].tokens == tuple(tokens[5:])


def test_one_seed_gives_one_text_at_every_layout(models, ranks):
    directory = models["pre-norm"][0]
    results = [
        result
        for tp, pp in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2))
        for result in ranks(tp * pp).run(rank_jobs.sampled_tokens, directory, tp, pp)
    ]
    assert len(results) == 13
    assert all(result == results[0] for result in results)
    assert len(set(results[0])) == 3


def test_sampling_does_not_depend_on_the_rest_of_the_batch(models, alone):
    directory, model = models["story"]
    engine = Engine(load_model(directory, None, alone), alone)
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=20, seed=seed, top_k=40, ignore_eos=True))
        for seed, prompt in enumerate(prompts_for(model))
    ]
    batched = [replace(completion, request=0) for completion in engine.complete(requests)]
    assert batched == [engine.complete([request])[0] for request in requests]
    other_seed = Request(requests[0].prompt, SamplingParams(max_new_tokens=20, seed=99, top_k=40, ignore_eos=True))
    assert engine.complete([other_seed]) != engine.complete(requests[:1])


SEARCHES = [
    {"temperature": 5.0},
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2, "logit_bias": {300: 100.0}},
    {"num_beams": 3},
    {"penalty_alpha": 0.5, "top_k": 4},
]


@pytest.mark.parametrize("tp", [1, 2])
def test_suppressed_tokens_are_never_chosen(models, ranks, tp):
    """In a step with outputs of every kind, and in one of greedy requests alone, for which ranks give the argmax."""
    requests = [Request((2, 9, 400), SamplingParams(max_new_tokens=30, ignore_eos=True, **s)) for s in SEARCHES]
    for chosen in (requests, requests[1:2]):
        suppressed: set[int] = {516, -1}  # the model has no such rows
        for _ in range(2):
            found = ranks(tp).run(rank_jobs.suppressing, models["pre-norm"][0], tp, suppressed, chosen)[0]
            tokens = {token for completion in found for token in completion.tokens}
            assert tokens and not tokens & suppressed
            suppressed |= tokens


def test_a_rank_may_have_no_row_of_a_small_vocabulary(ranks, tmp_path):
    """Nine rows on four ranks: 3, 3, 3 and none."""
    oracle = random_model(vocab_size=9, num_hidden_layers=2)
    directory, prompt = save(oracle, tmp_path), [2, 5, 8]
    options = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    sampled = SamplingParams(max_new_tokens=20, temperature=2.0, ignore_eos=True, logprobs=3)
    requests = [Request(tuple(prompt), options), Request(tuple(prompt), sampled)]
    one = ranks(1).run(rank_jobs.generate, directory, 1, 1, requests)[0]
    assert one[0].tokens == oracle_greedy(oracle, prompt, 20)
    for found in ranks(4).run(rank_jobs.generate, directory, 4, 1, requests):
        assert [completion.tokens for completion in found] == [completion.tokens for completion in one]


def test_log_probabilities_are_normalised_over_all_rows(models, alone):
    """As transformers', those of ids that are never generated included; no error for such an id in a prompt."""
    directory, oracle = models["pre-norm"]
    engine = Engine(load_model(directory, None, alone), alone, suppress_tokens=range(40, 516))
    prompt = (2, 100, 515, 9)
    params = SamplingParams(max_new_tokens=1, temperature=0, echo=True, logprobs=1, repetition_penalty=1.1)
    (done,) = engine.complete([Request(prompt, params)])
    with torch.no_grad():
        rows = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
    wanted = [rows[n, token].item() for n, token in enumerate((*prompt[1:], *done.tokens))]
    found = [*(event.logprob for event in done.prompt_events[1:]), *done.logprobs]
    assert found == pytest.approx(wanted, abs=1e-4) and done.tokens[0] < 40


def test_end_of_sequence_stops_unless_ignored(models, alone):
    directory, _ = models["pre-norm"]
    engine = Engine(
        load_model(directory, None, alone), alone, suppress_tokens=range(20, 516)
    )  # so that the end comes up soon

    def run(**options):
        params = SamplingParams(max_new_tokens=100, temperature=30.0, **options)
        return engine.complete([Request((5, 9), params)])[0]

    on, off = run(ignore_eos=True), run()
    assert 2 in on.tokens[:-1]
    assert off.tokens == on.tokens[: on.tokens.index(2) + 1]
    assert (off.finish_reason, on.finish_reason) == ("stop", "length")


def test_text_stop_strings_and_streams(models, alone):
    directory, _ = models["story"]
    tokenizer = OPTTokenizer.from_directory(directory)
    engine = Engine(load_model(directory, None, alone), alone)
    prompt = tuple(tokenizer.encode("Once upon a time"))

    def run(**options):
        params = SamplingParams(max_new_tokens=50, temperature=0, **options)
        events = list(engine.generate([Request(prompt, params, tokenizer.stream)]))
        return "".join(event.text for event in events), events

    text, events = run()
    assert text == tokenizer.decode([event.token for event in events])
    assert [event.finish_reason for event in events] == [None] * 49 + ["length"]
    stop = text[20:29]  # begins and ends within tokens
    stopped, events = run(stop=("never to be seen", stop))
    assert stopped == text[: text.index(stop)]
    assert events[-1].finish_reason == "stop" and len(events) < 50
    assert run(stop=(stop,), include_stop=True)[0] == text[: text.index(stop) + len(stop)]
    word = next(re.finditer(r"[a-z]{5}", text))
    assert run(stop_regex=(r"[a-z]{5}", "never"))[0] == text[: word.start()]
    assert run(stop_regex=(r"[a-z]{5}",), include_stop=True)[0] == text[: word.end()]
    assert len(run(stop=(stop,), stop_regex=(r"[a-z]{5}",), min_new_tokens=30)[1]) > 30


def test_ids_and_texts_that_may_or_must_not_be_written(models, alone):
    directory, _ = models["story"]
    opt = OPT.from_model(load_model(directory, None, alone), alone, OPTTokenizer.from_directory(directory))

    def run(prompt, **options):
        return opt.generate(prompt, **{"max_new_tokens": 24, "temperature": 0} | options)[0]

    text = run("The king had").text
    assert " daughter" in text or " great" in text
    words = ("daughter", " great", "a")
    without = run("The king had", bad_words=words)
    tokens = [opt.tokenizer.decode([token]) for token in without.tokens]
    assert not {word for bare in ("daughter", "great", "a") for word in (bare, " " + bare)} & set(tokens)
    assert set(run("The king", allowed_token_ids=(262, 15)).tokens) <= {262, 15}
    with pytest.raises(UserError, match="prompt 1: allowed_token_ids has 99999, but ids go"):
        run("The king", allowed_token_ids=(99999,))
    options = {"logit_bias": {1: 100}, "max_new_tokens": 2}
    assert run("The king", **options).text == ""
    assert run("The king", **options, skip_special_tokens=False).text == "<pad><pad>"


def test_a_character_that_the_prompt_begins_is_completed(models, alone):
    directory, _ = models["story"]
    opt = OPT.from_model(load_model(directory, None, alone), alone, OPTTokenizer.from_directory(directory))
    first, *rest = opt.tokenizer.encode("\u20ac", add_bos=False)
    completion = opt.generate([(2, first)], max_new_tokens=2, temperature=0, allowed_token_ids=rest[:1])[0]
    assert len(rest) == 2 and completion.text == opt.tokenizer.decode([first, *completion.tokens]) == "\u2082"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "has no tokens"),
        ((2, 516), {}, "holds the id 516, but ids go from 0 to 515"),
        ((5,) * 256, {}, "256 tokens with BOS, and the model has 256 positions: shorten it to 255"),
        ((5,) * 200, {"max_new_tokens": 57}, "57 new ones would pass the model's 256 positions: ask for 56 or fewer"),
        ((5,), {"stop": ("x",)}, "stop strings, which need a tokenizer"),
    ],
)
def test_requests_that_cannot_run(models, prompt, params, message):
    from opt_megatron.config import OPTConfig

    config = OPTConfig.from_directory(models["pre-norm"][0])
    with pytest.raises(UserError, match=message):
        check_request(Request(prompt, SamplingParams(**params)), config)


def test_every_position_can_be_used(models, alone):
    directory, model = models["pre-norm"]
    engine = Engine(load_model(directory, None, alone), alone)
    request = Request((5,) * 250, SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True))
    assert engine.complete([request])[0].tokens == oracle_greedy(model, [5] * 250, 6)


def test_a_bad_request_ends_no_rank_and_hangs_none(models, ranks):
    messages = ranks(2).run(rank_jobs.leader_error_of_bad_request, models["pre-norm"][0], 2)
    assert "has 297 tokens" in messages[0] and messages[1] == ""


def test_a_caller_may_stop_listening(models, ranks):
    first, second = ranks(2).run(rank_jobs.abandoned_stream, models["pre-norm"][0], 2)
    assert len(first) == 2 and second == []


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_marked_searches_are_transformers_at_every_layout(models, ranks, scheme, options):
    directory, oracle = models["post-norm"]
    prompt = prompts_for(oracle)[1]
    config = WatermarkingConfig(bias=3.0, greenlist_ratio=0.5, hashing_key=77, seeding_scheme=scheme, context_width=2)
    expected = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, watermarking_config=config, eos_token_id=None,
        **options,
    )  # fmt: skip
    marked = {"watermark_delta": 3.0, "watermark_gamma": 0.5, "watermark_key": 77, "watermark_scheme": scheme}
    params = SamplingParams(
        max_new_tokens=24, temperature=0, ignore_eos=True, watermark_context_width=2, **marked, **options
    )
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        for completions in ranks(tp * pp).run(rank_jobs.generate, directory, tp, pp, [Request(prompt, params)]):
            assert [completion.tokens for completion in completions] == [tuple(expected[0, len(prompt) :].tolist())]
