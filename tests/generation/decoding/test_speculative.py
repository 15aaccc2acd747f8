"""Speculative decoding changes the number of steps, and nothing of the output."""

import itertools

import pytest
import rank_jobs
import torch
from factory import oracle_greedy, prompts_for, random_model, save
from rule_model import RuleModel, rule_engine

from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.logits_processors import ProcessorChain
from opt_megatron.generation.sampling.sampler import distribution
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.sampling.token_history import TokenHistory

VOCABULARY = 4


@pytest.fixture(scope="module")
def drafts(models, tmp_path_factory):
    """Name of a model -> the directory of another model with its vocabulary."""
    sizes = {name: model.config.vocab_size for name, (_, model) in models.items() if name != "story"}
    made = {name: random_model(seed=8, num_hidden_layers=2, vocab_size=size) for name, size in sizes.items()}
    return {name: save(model, tmp_path_factory.mktemp("draft")) for name, model in made.items()}


@pytest.fixture(scope="module")
def model(models, alone):
    return load_model(models["pre-norm"][0], None, alone)


def greedy(prompts, new: int = 40, **options) -> list[Request]:
    return [Request(p, SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True, **options)) for p in prompts]


def counted(engine: Engine, runner: int = 0) -> list:
    """The steps that one of the engine's runners makes from now on."""
    steps, forward = [], engine._runners[runner].forward
    engine._runners[runner].forward = lambda step: steps.append(step) or forward(step)
    return steps


@pytest.mark.parametrize("kind", ["lookup", "another model", "itself"])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_greedy_tokens_are_the_oracles(models, alone, drafts, name, kind):
    directory, oracle = models[name]
    draft = None if kind == "lookup" else load_model(directory if kind == "itself" else drafts[name], None, alone)
    options = {"draft_model": draft, "prompt_lookup": kind == "lookup", "max_batch_size": 3}
    engine = Engine(load_model(directory, None, alone), alone, prefill_chunk_size=8, **options)
    prompts = prompts_for(oracle)[:4]
    expected = [oracle_greedy(oracle, list(prompt), 40) for prompt in prompts]
    assert [c.tokens for c in engine.complete(greedy(prompts))] == expected


@pytest.mark.parametrize("kind", ["lookup", "another model", "itself"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_greedy_tokens_over_ranks(models, ranks, drafts, tp, pp, kind):
    directory, oracle = models["pre-norm"]
    draft = {"lookup": None, "another model": drafts["pre-norm"], "itself": directory}[kind]
    prompts = prompts_for(oracle)[:3]
    expected = [oracle_greedy(oracle, list(prompt), 25) for prompt in prompts]
    for completions in ranks(tp * pp).run(rank_jobs.speculate, directory, draft, tp, pp, greedy(prompts, 25)):
        assert [c.tokens for c in completions] == expected


def test_a_draft_that_is_always_right_saves_steps(model, alone):
    engine = Engine(model, alone, draft_model=model, num_speculative_tokens=4)
    steps, of_draft = counted(engine), counted(engine, 1)
    (done,) = engine.complete(greedy([(2, 5, 9)], 41))
    assert len(done.tokens) == 41
    assert len(steps) == 1 + 8  # the prompt, then five tokens a step
    assert len(of_draft) == 4 * 8 and all(len(step.sequences[0].tokens) <= 2 for step in of_draft[1:])
    counters = engine._scheduler.counters
    assert (counters.drafts, counters.draft_tokens, counters.accepted_tokens) == (8, 32, 32)


def test_prompt_lookup_saves_steps_where_text_repeats(model, alone):
    rule = RuleModel(12)
    rule.logits = lambda tokens: torch.eye(12)[(tokens[-1] + 1) % 12]
    engine = rule_engine(Engine(model, alone, prompt_lookup=True), rule)
    (done,) = engine.complete(greedy([(3,)], 60))
    assert done.tokens == tuple((4 + n) % 12 for n in range(60))
    assert rule.steps == 13 + 10  # once around and a step more, and then five tokens a step


def test_proposals_stay_within_the_tokens_asked_for(models, alone):
    """Up to the last position of the model, with more proposals than there is room for."""
    directory, oracle = models["pre-norm"]
    own = load_model(directory, None, alone)
    engine = Engine(own, alone, draft_model=own, num_speculative_tokens=9)
    prompts = [(5,) * 250, (7,) * 245, (9, 11)]
    expected = [oracle_greedy(oracle, list(p), n) for p, n in zip(prompts, (6, 11, 1), strict=True)]
    requests = [greedy([p], n)[0] for p, n in zip(prompts, (6, 11, 1), strict=True)]
    assert [c.tokens for c in engine.complete(requests)] == expected


PROMPT = tuple(n % 3 for n in range(20))
FILTERS = [{}, {"temperature": 0.6, "top_k": 3}, {"repetition_penalty": 1.5, "top_p": 0.9, "presence_penalty": 0.5}]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_sampled_tokens_follow_the_models_own_distribution(model, alone, kind, options):
    rule, draft = RuleModel(VOCABULARY), RuleModel(VOCABULARY, blend=2.0) if kind == "draft" else None
    made = {"max_batch_size": 64, "num_speculative_tokens": 3}
    made |= {"draft_model": model} if draft else {"prompt_lookup": True}
    engine = rule_engine(Engine(model, alone, **made), rule, draft)
    # Prompts share all but their last token, so that from the second one on even the first new token is proposed.
    params = SamplingParams(max_new_tokens=3, n=3000, ignore_eos=True, seed=9, **options)
    counts = dict.fromkeys(itertools.product(range(VOCABULARY), repeat=3), 0)
    for completion in engine.complete([Request(PROMPT, params)]):
        counts[completion.tokens] += 1
    assert rule.computed > 3 * 3000  # proposals were verified

    expected = {tokens: 3000 * probability(rule, params, tokens) for tokens in counts}
    assert all(counts[tokens] == 0 for tokens in counts if expected[tokens] == 0)
    cells = [(counts[tokens], wanted) for tokens, wanted in expected.items() if wanted >= 5]
    rare = [(counts[tokens], wanted) for tokens, wanted in expected.items() if wanted < 5]
    cells.append((sum(count for count, _ in rare), sum(wanted for _, wanted in rare) or 1e-9))
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4  # of chi-square's, less than 1 in 10000 is above


def probability(rule: RuleModel, params: SamplingParams, tokens) -> float:
    chain, history, product = ProcessorChain(params), TokenHistory(PROMPT), 1.0
    for token in tokens:
        product *= float(distribution(rule.logits(tuple(history.tokens)), chain, history)[token])
        history.append(token)
    return product


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"echo": True}])
def test_what_is_certain_does_not_depend_on_the_draft(model, alone, kind, options):
    rule, made = RuleModel(12), {"max_batch_size": 4, "prefill_chunk_size": 7}
    requests = greedy([tuple(n * n % 11 for n in range(begin, 30)) for begin in range(0, 20, 3)], 20, **options)
    plain = rule_engine(Engine(model, alone, **made), rule).complete(requests)
    draft = RuleModel(12, blend=0.5) if kind == "draft" else None
    made |= {"draft_model": model} if draft else {"prompt_lookup": True}
    assert rule_engine(Engine(model, alone, **made), rule, draft).complete(requests) == plain


def test_accepted_proposals_are_fewer_steps(model, alone):
    rule, draft = RuleModel(12), RuleModel(12, blend=0.5)
    made = {"draft_model": model, "num_speculative_tokens": 3}
    params = SamplingParams(max_new_tokens=120, ignore_eos=True)
    rule_engine(Engine(model, alone, **made), rule, draft).complete([Request((5, 7), params)])
    assert rule.steps < 80 and rule.computed > 120


def test_drafts_that_cannot_be_used(models, model, alone, tmp_path):
    other = load_model(save(random_model(vocab_size=600, num_hidden_layers=1), tmp_path), None, alone)
    with pytest.raises(UserError, match="the draft model has 600 vocabulary rows and the model 516"):
        Engine(model, alone, draft_model=other)
    with pytest.raises(UserError, match="a draft model and prompt lookup are given; use one of them"):
        Engine(model, alone, draft_model=model, prompt_lookup=True)
