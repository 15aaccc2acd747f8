"""Contrastive search against the formula of Su et al. 2022, computed with whole passes of transformers' model."""

import pytest
import rank_jobs
import torch
from factory import prompts_for
from torch.nn.functional import cosine_similarity

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.tokenizer import OPTTokenizer


def oracle(model, prompt, new_tokens: int, k: int, alpha: float, banned=()) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[list(banned)] = -torch.inf
        probabilities, candidates = logits.softmax(-1).topk(k)
        rows = torch.cat((torch.tensor(tokens).expand(k, -1), candidates[:, None]), dim=1)
        with torch.no_grad():
            hidden = model(rows, output_hidden_states=True).hidden_states[-1]
        penalty = cosine_similarity(hidden[:, -1:], hidden[:, :-1], dim=-1).amax(1)
        tokens.append(int(candidates[((1 - alpha) * probabilities - alpha * penalty).argmax()]))
    return tuple(tokens[len(prompt) :])


def search(new_tokens: int, k: int, alpha: float, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, top_k=k, penalty_alpha=alpha, ignore_eos=True, **options)


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (2, 0.9), (8, 0.2), (3, 1.0)])
@pytest.mark.parametrize("name", ["pre-norm", "story"])
def test_tokens_are_those_of_the_formula(models, alone, name, k, alpha):
    directory, model = models[name]
    engine = Engine(load_model(directory, None, alone), alone, prefill_chunk_size=6)
    prompts = prompts_for(model)[:4]  # one of a single token among them
    completions = engine.complete([Request(prompt, search(15, k, alpha)) for prompt in prompts])
    assert [c.tokens for c in completions] == [oracle(model, prompt, 15, k, alpha) for prompt in prompts]


def test_it_differs_from_greedy_search_and_takes_filters(models, alone):
    directory, model = models["story"]
    tokenizer = OPTTokenizer.from_directory(directory)
    engine = Engine(load_model(directory, None, alone), alone)
    prompt = tuple(tokenizer.encode("Once upon a time"))
    greedy = SamplingParams(max_new_tokens=15, temperature=0, ignore_eos=True)
    params = [search(15, 4, 0.6), search(15, 4, 0.6, banned_tokens=(262, 17)), greedy]
    plain, banned, greedy = engine.complete([Request(prompt, p, tokenizer.stream) for p in params])
    assert plain.tokens == oracle(model, prompt, 15, 4, 0.6) != greedy.tokens
    assert banned.tokens == oracle(model, prompt, 15, 4, 0.6, (262, 17)) != plain.tokens
    assert plain.text == tokenizer.decode(plain.tokens)


def test_probabilities_are_the_models(models, alone):
    directory, model = models["pre-norm"]
    prompt = prompts_for(model)[0]
    (done,) = Engine(load_model(directory, None, alone), alone).complete(
        [Request(prompt, search(9, 4, 0.6, logprobs=3))]
    )
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, *done.tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = scores.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(done.logprobs), own, atol=1e-4)
    assert [[token for token, _ in row] for row in done.top_logprobs] == scores.topk(3).indices.tolist()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_contrastive_search_over_ranks(models, ranks, tp, pp):
    directory, model = models["pre-norm"]
    prompts = prompts_for(model)[:2]
    requests = [Request(prompt, search(10, 4, 0.6)) for prompt in prompts]
    for completions in ranks(tp * pp).run(rank_jobs.generate, directory, tp, pp, requests):
        assert [c.tokens for c in completions] == [oracle(model, prompt, 10, 4, 0.6) for prompt in prompts]
