"""Logits against transformers' OPT in fp32, the oracle: every layout, with and without cache, padded or not."""

import copy

import pytest
import rank_jobs
import torch
from factory import OPT_125M, divides, random_model, save

from opt_megatron.checkpoint.load import load_model

LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)]
TOLERANCE = 1e-4
MODELS = ["pre-norm", "post-norm", "story"]


def tokens_for(model, rows: int, columns: int) -> torch.Tensor:
    return torch.randint(4, model.config.vocab_size, (rows, columns), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_gives_the_oracles_logits_to_the_bit(models, alone, name):
    directory, oracle = models[name]
    tokens = tokens_for(oracle, 3, 60)
    with torch.no_grad():
        ours = load_model(directory, None, alone, "float32")(tokens)
        assert torch.equal(ours, oracle(tokens).logits)


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_logits(models, ranks, name, tp):
    directory, oracle = models[name]
    if not divides(oracle, tp):
        pytest.skip("the layout does not divide this model")
    tokens = tokens_for(oracle, 2, 40)
    with torch.no_grad():
        expected = oracle(tokens).logits
    for logits in ranks(tp).run(rank_jobs.full_logits, directory, tp, tokens):
        assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_at_every_layout(models, ranks, name, tp, pp):
    directory, oracle = models[name]
    if not divides(oracle, tp, pp):
        pytest.skip("the layout does not divide this model")
    tokens = tokens_for(oracle, 1, 30)
    with torch.no_grad():
        expected = oracle(tokens).logits[0, 11:]
    logits = ranks(tp * pp).run(rank_jobs.cached_logits, directory, tp, pp, tokens[0].tolist(), 12)[0]
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_follow_the_attention_mask(models, alone, name, side):
    directory, oracle = models[name]
    tokens = tokens_for(oracle, 3, 24)
    mask = torch.ones_like(tokens)
    for row, padding in ((1, 7), (2, 23)):
        mask[row, slice(0, padding) if side == "left" else slice(24 - padding, 24)] = 0
    with torch.no_grad():
        ours = load_model(directory, None, alone)(tokens, attention_mask=mask)
        theirs = oracle(tokens, attention_mask=mask).logits
    assert (ours - theirs)[mask.bool()].abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_half_precision_has_no_nan_in_padded_batches(models, alone, name, dtype, side):
    directory, oracle = models[name]
    tokens = tokens_for(oracle, 3, 24)
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 20) if side == "left" else slice(4, 24)] = 0
    with torch.no_grad():
        logits = load_model(directory, None, alone, dtype)(tokens, attention_mask=mask)
        reference = oracle(tokens, attention_mask=mask).logits
    assert logits.dtype == getattr(torch, dtype)
    assert torch.isfinite(logits).all()
    # Rounded weights still mean the same model: the error is that of the number format, not of a wrong mask.
    error = (logits.float() - reference)[mask.bool()].abs().mean() / reference.abs().mean()
    assert error < (0.01 if dtype == "float16" else 0.06)


def test_position_limit_is_the_tables_last_row(models, alone):
    directory, oracle = models["pre-norm"]
    tokens = tokens_for(oracle, 1, 256)  # all positions of the model
    with torch.no_grad():
        assert torch.equal(load_model(directory, None, alone)(tokens), oracle(tokens).logits)


def test_real_125m_dimensions(tmp_path, alone, ranks):
    oracle = random_model(scale=0.02, **OPT_125M)
    directory = save(oracle, tmp_path)
    tokens = tokens_for(oracle, 1, 20)
    with torch.no_grad():
        expected = oracle(tokens).logits
        ours = load_model(directory, None, alone)(tokens)
    assert torch.equal(ours, expected)
    for logits in ranks(2).run(rank_jobs.full_logits, directory, 2, tokens):
        assert (logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_a_16_bit_checkpoint_is_computed_as_its_float32(models, ranks, tmp_path, name, dtype, tp, pp):
    """With --dtype auto, which stores 16 bits a weight where there are CPU kernels."""
    oracle = copy.deepcopy(models[name][1]).to(dtype)
    directory = save(oracle, tmp_path / "16")
    tokens = tokens_for(oracle, 1, 30)
    with torch.no_grad():
        expected = oracle.float()(tokens).logits[0]
    logits = ranks(tp * pp).run(rank_jobs.cached_logits, directory, tp, pp, tokens[0].tolist(), 12)[0]
    assert (logits - expected[11:]).abs().max() <= TOLERANCE
    assert torch.equal(logits.argmax(-1), expected[11:].argmax(-1))
