"""8-bit and 4-bit models against the float ones that they were made of."""

import copy
import math
import weakref

import pytest
import rank_jobs
import torch
from factory import random_model, save

from opt_megatron.checkpoint import load
from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.tokenizer import OPTTokenizer

MODELS = ["pre-norm", "post-norm", "story"]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, as a share of the spread of the logits."""
    return float((ours.float() - exact).pow(2).mean().sqrt() / exact.std())


def tokens_for(model, columns: int = 40) -> torch.Tensor:
    return torch.randint(4, model.config.vocab_size, (1, columns), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_near_the_float_ones(models, ranks, name, tp, pp):
    directory, oracle = models[name]
    tokens = tokens_for(oracle)
    with torch.no_grad():
        exact = oracle(tokens).logits[0, 11:]
    for quantization, bound in (("int8", 0.05), ("int4-g32", 0.3)):
        job = directory, tp, pp, tokens[0].tolist(), 12, quantization
        logits = ranks(tp * pp).run(rank_jobs.cached_logits, *job)[0]
        assert error(logits, exact) < bound, quantization


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_forward_pass_too(models, alone, name, dtype):
    directory, oracle = models[name]
    tokens = tokens_for(oracle)
    with torch.no_grad():
        ours = load_model(directory, None, alone, dtype, quantization="int8")(tokens)
        assert error(ours, oracle(tokens).logits) < 0.05
    assert ours.dtype is getattr(torch, dtype)


@pytest.fixture(scope="module")
def story(models, alone):
    """The tokenizer of 'story' and two engines: float32 and int8."""
    directory = models["story"][0]
    engines = [Engine(load_model(directory, None, alone, quantization=kind), alone) for kind in (None, "int8")]
    return OPTTokenizer.from_directory(directory), *engines


def text_of(engine: Engine, tokenizer: OPTTokenizer) -> tuple[int, ...]:
    """A story that the engine tells."""
    prompt = tuple(tokenizer.encode("Once upon a time there was a"))
    params = SamplingParams(max_new_tokens=400, seed=4, top_p=0.95, ignore_eos=True)
    return (*prompt, *engine.complete([Request(prompt, params)])[0].tokens)


def scored(engine: Engine, tokens: tuple[int, ...], n: int = 0):
    params = SamplingParams(max_new_tokens=0, echo=True, logprobs=n)
    return engine.complete([Request(tokens, params)])[0].prompt_events[1:]


def test_perplexity_hardly_changes(story):
    tokenizer, exact, int8 = story
    text = text_of(exact, tokenizer)
    surprise = [[-event.logprob for event in scored(engine, text)] for engine in (exact, int8)]
    perplexity = [math.exp(sum(values) / len(values)) for values in surprise]
    assert abs(perplexity[1] / perplexity[0] - 1) <= 0.01
    assert perplexity[0] < 100  # of 4096 tokens


def test_the_best_token_is_mostly_the_same(story):
    tokenizer, exact, int8 = story
    text = text_of(exact, tokenizer)
    best = [[event.top_logprobs[0][0] for event in scored(engine, text, 1)] for engine in (exact, int8)]
    least = 0.96 if torch.cpu._is_vnni_supported() else 0.92  # elsewhere activations have half as many steps
    assert sum(a == b for a, b in zip(*best, strict=True)) >= least * len(best[0])


def test_results_do_not_depend_on_the_batch(story):
    tokenizer, _, int8 = story
    texts = ["Once upon a time", "The king", "There", "A fox and a cat went", "The youngest daughter said"]
    params = [SamplingParams(max_new_tokens=25, temperature=0.7 * (n % 2), seed=n, logprobs=0) for n in range(5)]
    requests = [Request(tuple(tokenizer.encode(t)), p) for t, p in zip(texts, params, strict=True)]
    num_equal = 0
    for request, together in zip(requests, int8.complete(requests), strict=True):
        (alone,) = int8.complete([request])
        pairs = zip(together.tokens, alone.tokens, strict=True)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(alone.tokens))
        num_equal += same == len(alone.tokens)
        # Where attention's last bit differs, an activation may be rounded to the next step. That moves a probability
        # by less than this, and a token that was drawn within it of the next one's share becomes another.
        assert together.logprobs[:same] == pytest.approx(alone.logprobs[:same], abs=0.02)
    assert num_equal >= len(requests) - 1


def test_the_same_text_at_every_layout(models, ranks, story):
    tokenizer, _, int8 = story
    greedy = SamplingParams(max_new_tokens=20, temperature=0)
    requests = [Request(tuple(tokenizer.encode(text)), greedy) for text in ("Once upon a time", "The king")]
    expected = [c.tokens for c in int8.complete(requests)]
    for completions in ranks(2).run(rank_jobs.generate, models["story"][0], 1, 2, requests, "int8"):
        assert [c.tokens for c in completions] == expected


def test_an_8_bit_draft_changes_nothing(models, alone, story):
    tokenizer, exact, _ = story
    directory = models["story"][0]
    draft = load_model(directory, None, alone, quantization="int8")
    engine = Engine(load_model(directory, None, alone), alone, draft_model=draft)
    request = Request(tuple(tokenizer.encode("The king")), SamplingParams(max_new_tokens=40, temperature=0))
    assert engine.complete([request]) == exact.complete([request])


def test_float_weights_are_never_held(tmp_path, alone, monkeypatch):
    directory = save(random_model(hidden_size=192, ffn_dim=768), tmp_path)
    targets, held, read_parameter = [], [], load.read_parameter

    def watched(target, *args):
        targets.append(weakref.ref(target))
        held.append(sum(tensor.nbytes for ref in targets if (tensor := ref()) is not None))
        read_parameter(target, *args)

    monkeypatch.setattr(load, "read_parameter", watched)
    exact = load_model(directory, None, alone)
    total = sum(parameter.nbytes for parameter in exact.parameters())
    assert max(held) == total
    targets, held = [], []
    int8 = load_model(directory, None, alone, quantization="int8")
    kept = [parameter for parameter in int8.parameters() if parameter.device.type != "meta"]
    assert sum(parameter.nbytes for parameter in kept) < 0.02 * total
    assert max(held) < 0.02 * total + 768 * 192 * 4  # and one matrix at a time
    assert [parameter.numel() for parameter in kept if parameter.dim() > 1] == [258 * 192]  # the positions
    assert int8.params_dtype is torch.float32


def test_other_kinds_are_refused(models, alone):
    with pytest.raises(UserError, match=r"quantization 'int3': choose .*int8.* or none"):
        load_model(models["story"][0], None, alone, quantization="int3")


@pytest.mark.parametrize("quantization", ["int8", "int4-g32"])
@pytest.mark.parametrize("factor", [100, 0.01])
def test_outlier_channels_cost_nothing(models, alone, tmp_path, quantization, factor):
    """Two channels of both norms multiplied, the columns that read them divided: the same function, in floats."""
    directory, oracle = models["story"]
    planted = copy.deepcopy(oracle)
    with torch.no_grad():
        for layer in planted.model.decoder.layers:
            attention = layer.self_attn
            for norm, linears in (
                (layer.self_attn_layer_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.final_layer_norm, (layer.fc1,)),
            ):
                for parameter in (norm.weight, norm.bias):
                    parameter[[7, 100]] *= factor
                for linear in linears:
                    linear.weight[:, [7, 100]] /= factor
        tokens = tokens_for(oracle)
        exact = oracle(tokens).logits
        ordinary, outliers = (
            error(load_model(path, None, alone, quantization=quantization)(tokens), exact)
            for path in (directory, save(planted, tmp_path))
        )
    assert outliers <= 1.1 * ordinary
