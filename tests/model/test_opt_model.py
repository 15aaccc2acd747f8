"""Weights that the linear methods store, and the way back."""

import pytest
import rank_jobs
import torch

from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_restored_weights_are_the_same_to_the_bit(models, ranks, name, tp, pp):
    assert ranks(tp * pp).run(rank_jobs.weights_are_restored, models[name][0], tp, pp) == [True] * (tp * pp)


def test_a_changed_weight_takes_effect_in_a_running_engine(models, alone):
    directory, oracle = models["pre-norm"]
    model = load_model(directory, None, alone)
    engine = Engine(model, alone)
    request = Request((2, 7, 11), SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True))
    before = engine.complete([request])
    model.restore_weights()
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    original = weight.clone()
    tokens = torch.tensor([[2, 7, 11]])
    with torch.no_grad():
        assert torch.equal(model(tokens), oracle(tokens).logits)
        weight.mul_(-3)
    model.prepare_inference()
    assert engine.complete([request]) != before
    model.restore_weights()
    with torch.no_grad():
        model.decoder.layers[0].mlp.linear_fc1.weight.copy_(original)
    model.prepare_inference()
    assert engine.complete([request]) == before


def test_quantised_weights_are_not_restored(models, alone):
    model = load_model(models["pre-norm"][0], None, alone, quantization="int8")
    tokens = torch.tensor([[2, 7, 11]])
    with torch.no_grad():
        before = model(tokens)
        with pytest.raises(UserError, match="load it without quantization to read or change weights"):
            model.restore_weights()
        assert torch.equal(model(tokens), before)
