"""The engine with a rule instead of the model: batches, commands and choices, without tensors."""

from dataclasses import replace

import pytest
from factory import random_model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_model import RuleModel, rule_engine

from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core import engine as engine_module
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.core.executor import Command, Executor
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import BLOCK_SIZE
from opt_megatron.parallel.command_loop import STOP
from opt_megatron.parallel.memory import Memory

VOCABULARY = 12
BASE = tuple(n * n % 11 for n in range(60))  # prompts begin with it, so that they share prefixes
KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_k": 6},
    "penalised": {"temperature": 0, "repetition_penalty": 1.5},
    "scored": {"temperature": 0.9, "logprobs": 2},
    "echoed": {"temperature": 0, "echo": True, "logprobs": 1},
    "three": {"n": 3, "top_p": 0.9},
    "best": {"best_of": 3, "n": 2},
    "beams": {"num_beams": 3, "n": 2},
    "contrastive": {"penalty_alpha": 0.4, "top_k": 3},
}


@pytest.fixture(scope="module")
def make(alone, tmp_path_factory):
    """An engine whose model is a rule."""
    directory = save(random_model(vocab_size=VOCABULARY), tmp_path_factory.mktemp("twelve"))
    model = load_model(directory, None, alone)

    def engine(rule=None, draft=None, **options):
        options |= {} if draft is None else {"draft_model": model}
        made = Engine(model, alone, **options)
        return rule_engine(made, rule or RuleModel(VOCABULARY), draft)

    per_token = Engine(model, alone)._runners[0].cache_bytes_per_token
    engine.memory = lambda blocks: blocks * BLOCK_SIZE * per_token
    return engine


def request(prompt, new=8, **options) -> Request:
    return Request(tuple(prompt), SamplingParams(max_new_tokens=new, ignore_eos=True, **options))


def without_numbers(completions):
    return [replace(completion, request=0, prompt_events=()) for completion in completions]


def requests_of(kinds) -> st.SearchStrategy:
    one = st.builds(
        lambda shared, own, new, kind, seed, ignore_eos, client: Request(
            (*BASE[:shared], *own),
            SamplingParams(max_new_tokens=new, seed=seed, ignore_eos=ignore_eos, **KINDS[kind]),
            client=client,
        ),
        st.sampled_from([0, 1, 15, 16, 17, 40, 60]),
        st.lists(st.integers(0, 11), min_size=1, max_size=3),
        st.integers(1, 8),
        st.sampled_from(kinds),
        st.integers(0, 3),
        st.booleans(),
        st.integers(0, 2),  # a client with fewer sequences preempts one with more
    )
    return st.lists(one, min_size=1, max_size=8)


def drafted(kind: str) -> dict:
    return {"draft": RuleModel(VOCABULARY, blend=0.5)} if kind == "model" else {"prompt_lookup": kind == "lookup"}


# With a draft, random numbers are drawn in an order that the batch has an influence on.
CERTAIN = ["greedy", "penalised", "echoed", "beams", "contrastive"]
DRAFTS_AND_REQUESTS = st.one_of(
    st.tuples(st.just("none"), requests_of(list(KINDS))),
    st.tuples(st.sampled_from(["lookup", "model"]), requests_of(CERTAIN)),
)


@settings(max_examples=150, deadline=None)
@given(DRAFTS_AND_REQUESTS, st.integers(3, 9), st.sampled_from([1, 3, 20, 256]), st.integers(6, 9), st.booleans())
def test_any_batch_gives_what_each_request_gives_alone(
    make, draft_and_requests, max_batch_size, chunk, blocks, runs_ahead
):
    draft, requests = draft_and_requests
    alone = [make().complete([one]) for one in requests]
    memory = make.memory(blocks) * (2 if draft == "model" else 1)  # six are enough for the largest request
    options = {"max_batch_size": max_batch_size, "prefill_chunk_size": chunk, "kv_cache_memory": memory}
    rule = RuleModel(VOCABULARY, keeps_tokens=runs_ahead)
    batched = make(rule, **drafted(draft), **options).complete(requests)
    for number, expected in enumerate(alone):
        mine = [completion for completion in batched if completion.request == number]
        assert without_numbers(mine) == without_numbers(expected)
        events = [[replace(event, request=0) for event in c.prompt_events] for c in mine]
        assert events == [list(c.prompt_events) for c in expected]


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "penalised"])
def test_tokens_are_those_of_the_rule(make, kind, chunk):
    rule = RuleModel(VOCABULARY)
    requests = [request(BASE[n : n + 20 + n], 12, seed=n, **KINDS[kind]) for n in range(6)]
    completions = make(rule, prefill_chunk_size=chunk).complete(requests)
    assert [c.tokens for c in completions] == [rule.continued(r.prompt, r.params) for r in requests]


def test_a_step_computes_no_more_of_prompts_than_a_chunk(make):
    rule = RuleModel(VOCABULARY)
    make(rule, prefill_chunk_size=10).complete([request(BASE[:45], 1, temperature=0), request((9, *BASE[:44]), 1)])
    assert (rule.steps, rule.computed) == (9, 90)


def test_commands_are_all_that_a_follower_needs(make, alone):
    """What is sent, executed by another rank's runners, leaves the same in the caches."""
    rule, draft, other, other_draft = (RuleModel(VOCABULARY, blend=blend) for blend in (0, 0.5, 0, 0.5))
    engine = make(rule, draft, prefill_chunk_size=20, max_batch_size=4, kv_cache_memory=2 * make.memory(3))
    sent = []
    commands = engine._executor.commands
    commands.has_followers = True
    commands.send = lambda command, numbers=(): sent.append((command, [int(number) for number in numbers]))
    engine.complete([request(BASE[: 30 + 3 * n], 6, **options) for n, options in enumerate(KINDS.values())])
    first, *middle, last = [command for command, _ in sent]
    assert first is Command.ALLOCATE and last is STOP and set(middle) == {Command.FORWARD, Command.COPY}
    follower = Executor(alone, [other, other_draft])
    for command, numbers in sent[:-1]:
        follower.execute(command, numbers)
    assert (other.cells, other_draft.cells) == (rule.cells, draft.cells)


def test_each_of_n_samples_has_numbers_of_its_own(make):
    rule = RuleModel(VOCABULARY)
    one = request(BASE[:30], 10, n=4, seed=5)
    completions = make(rule).complete([one])
    assert [c.choice for c in completions] == [0, 1, 2, 3]
    expected = [rule.continued(one.prompt, one.params, choice) for choice in range(4)]
    assert [c.tokens for c in completions] == expected
    assert len(set(expected)) == 4


def test_best_of_returns_the_likeliest_samples(make):
    five = request(BASE[:30], 10, n=5, seed=5, logprobs=0)
    samples = make().complete([five])
    best = sorted(samples, key=lambda c: -sum(c.logprobs))[:2]
    params = replace(five.params, n=2, best_of=5)
    completions = make().complete([Request(five.prompt, params)])
    assert completions == [replace(c, choice=rank) for rank, c in enumerate(best)]
    silent = make().complete([Request(five.prompt, replace(params, logprobs=None))])
    assert [c.tokens for c in silent] == [c.tokens for c in best]
    assert all(c.logprobs == (None,) * 10 for c in silent)


def test_requests_wait_for_memory_and_refused_is_what_can_never_run(make):
    rule = RuleModel(VOCABULARY)
    engine = make(rule, kv_cache_memory=make.memory(2) + 999)
    requests = [request((n, *BASE[:19]), 9, temperature=0) for n in range(5)]
    assert [c.tokens for c in engine.complete(requests)] == [rule.continued(r.prompt, r.params) for r in requests]
    assert rule.sequences == 2
    message = "prompt 2 needs 192 tokens of KV cache and 128 fit into kv_cache_memory"
    with pytest.raises(UserError, match=message) as error:
        engine.complete([requests[0], request(BASE[:50], 80)])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="kv_cache_memory is 100 bytes, but 64 tokens, the minimum, take"):
        make(kv_cache_memory=100)
    with pytest.raises(UserError, match="prompt 1 needs 4 rows at a time; raise max_batch_size, which is 3"):
        make(max_batch_size=3).complete([request(BASE, num_beams=4)])


def test_the_cache_takes_no_more_than_what_is_free(make, monkeypatch):
    monkeypatch.setattr(engine_module, "device_memory", lambda device: Memory(make.memory(6), 10**12))
    engine = make()
    assert engine.num_cache_blocks == 5 and engine.kv_cache_bytes == make.memory(5)  # nine tenths of 6
    with pytest.raises(UserError, match="384 tokens of KV cache and 320 fit into the memory that is free"):
        engine.complete([request(BASE, num_beams=3)])
    monkeypatch.setattr(engine_module, "device_memory", lambda device: Memory(100, 10**12))
    with pytest.raises(UserError, match="the memory that is free is 90 bytes, but 64 tokens, the minimum, take"):
        make()


def test_ends_of_all_kinds(make):
    rule = RuleModel(VOCABULARY)
    plain = make(rule).complete([request(BASE, 40, temperature=0)])[0].tokens
    assert 2 in plain[1:]  # the end-of-sequence token

    def run(**options):
        params = SamplingParams(**({"max_new_tokens": 40, "temperature": 0} | options))
        return make(rule).complete([Request(BASE, params)])[0]

    first = plain.index(2)
    assert (run().tokens, run().finish_reason) == (plain[: first + 1], "stop")
    later = run(min_new_tokens=first + 1)
    assert len(later.tokens) > first + 1 and later.tokens[:first] == plain[:first] and 2 not in later.tokens[:-1]
    other = plain[4]
    stopped = run(ignore_eos=True, stop_token_ids=(other,))
    assert (stopped.tokens, stopped.finish_reason) == (plain[: plain.index(other) + 1], "stop")
    never = run(ignore_eos=True, stop_token_ids=(other,), min_new_tokens=40)
    assert len(never.tokens) == 40 and other not in never.tokens and never.finish_reason == "length"


@pytest.mark.parametrize("option", ["max_batch_size", "prefill_chunk_size", "num_speculative_tokens"])
def test_options_out_of_range(make, option):
    with pytest.raises(UserError, match=f"{option} is 0, but must be at least 1"):
        make(**{option: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"echo": True, "num_beams": 2}, "has no meaning in a beam search"),
        ({"echo": True, "penalty_alpha": 0.5, "top_k": 2}, "echo is True, but has no meaning in a contrastive search"),
        ({"logprobs": 1, "num_beams": 2}, "logprobs is 1, but has no meaning in a beam search"),
    ],
)
def test_options_that_no_search_could_serve(options, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**options)


def test_scoring_a_prompt_does_not_depend_on_its_pieces(make):
    wanted = make().complete([request(BASE[:9], 0, echo=True)])[0]
    assert len(wanted.prompt_events) == 9 and (wanted.tokens, wanted.finish_reason) == ((), "length")
    for chunk in range(1, 10):
        assert make(prefill_chunk_size=chunk).complete([request(BASE[:9], 0, echo=True)]) == [wanted]


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"n": 2, "best_of": 3}, {"temperature": 0, "logprobs": 1}])
def test_no_new_tokens_end_every_continuation(make, options):
    completions = make(prefill_chunk_size=7).complete([request(BASE[:20], 0, **options)] * 2)
    assert [(c.request, c.choice) for c in completions] == [(r, c) for r in (0, 1) for c in range(options.get("n", 1))]
    assert {(c.tokens, c.finish_reason, c.prompt_events) for c in completions} == {((), "length", ())}


def test_the_prompt_has_its_own_number_of_alternatives(make):
    (both,) = make().complete([request(BASE[:9], 4, temperature=0, prompt_logprobs=3, logprobs=1)])
    (echoed,) = make().complete([request(BASE[:9], 4, temperature=0, echo=True, logprobs=1)])
    assert (both.tokens, both.top_logprobs) == (echoed.tokens, echoed.top_logprobs)
    for got, less in zip(both.prompt_events, echoed.prompt_events, strict=True):
        assert (got.token, got.logprob, got.top_logprobs[:1]) == (less.token, less.logprob, less.top_logprobs)
    assert [len(event.top_logprobs) for event in both.prompt_events] == [0] + [3] * 8
    (alone,) = make().complete([request(BASE[:9], 4, temperature=0, prompt_logprobs=0)])
    assert [e.logprob for e in alone.prompt_events] == [e.logprob for e in both.prompt_events]
    assert alone.tokens == both.tokens and alone.logprobs == (None,) * 4


def test_greedy_continuations_are_equal(make):
    (wanted,) = make().complete([request(BASE, 8, temperature=0)])
    for options in ({"n": 3, "temperature": 0}, {"n": 2, "best_of": 3, "temperature": 0}, {"n": 2, "top_p": 0}):
        completions = make().complete([request(BASE, 8, **options)])
        assert {c.tokens for c in completions} == {wanted.tokens} and len(completions) == options["n"]


def test_any_seed_of_64_bits_gives_a_text(make):
    seeds = (-(2**63), -42, 2**63 - 1)
    first, again = ([make().complete([request(BASE, 8, seed=s, n=2)])[1].tokens for s in seeds] for _ in range(2))
    assert first == again and len(set(first)) == 3


def test_a_search_without_possible_tokens_is_refused(make):
    banned = {"banned_tokens": tuple(range(VOCABULARY))}
    for search in ({"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 3}):
        with pytest.raises(UserError, match="options leave"):
            make().complete([request(BASE, 4, **search, **banned)])


def test_a_seed_gives_one_text_with_drafts_too_whatever_the_batch(make):
    repeating = request(BASE[:20] * 2, 20, temperature=0.7, seed=7)
    results = make(prompt_lookup=True).complete([repeating] * 3)
    results += make(prompt_lookup=True, prefill_chunk_size=39).complete([repeating])
    assert len({completion.tokens for completion in results}) == 1
