"""The methods on one matrix: against the loops that their papers describe, and values of the authors' programs."""

import pytest
import torch

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.compression.column_solver import Curvature, NotPositiveDefiniteError, upper_factor
from opt_megatron.compression.gptq import gptq
from opt_megatron.compression.grid import Grid, round_to_nearest
from opt_megatron.compression.magnitude import magnitude_mask
from opt_megatron.compression.masks import kth_smallest
from opt_megatron.compression.recipe import Prune, Quantize
from opt_megatron.compression.smoothquant import smoothing_factors
from opt_megatron.compression.sparsegpt import sparsegpt
from opt_megatron.compression.wanda import wanda_mask

BITS = 3


def alone(tensor):
    """The sum over one rank."""
    return tensor


def problem(rows=24, inputs=600, seed=0):
    """A weight, inputs [tokens, I] of which two are dead, and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(900, inputs, generator=generator) @ mixing
    x[:, [5, 200]] = 0
    return weight, x, 2 * (x.double().t() @ x.double())


def inverse_factor(hessian, damping=0.01):
    """C by the definition: the upper Cholesky factor of the inverse."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True), dead


def by_definition(weight, hessian, *, size, prune=None, quantize=True):
    """GPTQ and SparseGPT in float64, one column after the other; returns the weight and the error."""
    factor, dead = inverse_factor(hessian)
    w, error = weight.double(), 0.0
    grid = Grid.covering(w, BITS, symmetric=False)
    w[:, dead] = 0
    for first in range(0, w.size(1), 128):
        start, stop = w.clone(), min(first + 128, w.size(1))
        mask = torch.zeros_like(w, dtype=torch.bool)
        if prune is not None and prune.sparsity:
            scores = w[:, first:stop].square() / factor.diagonal()[first:stop].square()
            threshold = scores.flatten().sort().values[int(scores.numel() * prune.sparsity)]
            mask[:, first:stop] = scores <= threshold
        for j in range(first, stop):
            if prune is not None and prune.pattern and j % 4 == 0:
                scores = w[:, j : j + 4].square() / factor.diagonal()[j : j + 4].square()
                mask[:, j : j + 4].scatter_(1, scores.topk(2, largest=False).indices, True)
            if size and j % size == 0:
                grid = Grid.covering(start[:, j : j + size], BITS, symmetric=False)
            column = w[:, j].masked_fill(mask[:, j], 0)
            replaced = grid.round(column[:, None])[:, 0] if quantize else column
            e = (w[:, j] - replaced) / factor[j, j]
            error += float(e.square().sum()) / 2
            w[:, j + 1 :] -= e[:, None] * factor[j, j + 1 :]
            w[:, j] = replaced
    return w, error


def agree(weight, expected):
    """Whether at most one in a thousand weights differs: those that lie between two values."""
    return ((weight - expected).abs() < 1e-4).float().mean() >= 0.999


@pytest.mark.parametrize("size", [None, 64, 100])
def test_gptq_is_its_definition(size):
    weight, _, hessian = problem()
    expected, error = by_definition(weight, hessian, size=size)
    solved = gptq(weight, Curvature.of(hessian, 0.01), Quantize(bits=BITS, group_size=size or -1))
    assert agree(solved.weight, expected) and solved.error == pytest.approx(error, rel=1e-3)
    assert solved.grids.scales.shape == (24, 1 if size is None else -(-600 // size))
    codes = solved.grids.codes(solved.weight)
    group = solved.grids.group_of
    again = (codes - solved.grids.zeros[:, group]) * solved.grids.scales[:, group]
    assert codes.max() == 7 and torch.allclose(again, solved.weight, atol=1e-6)


@pytest.mark.parametrize("static", [False, True])
def test_gptq_in_the_order_of_activations(static):
    """Of columns that are permuted already, the order changes nothing but their places."""
    weight, _, hessian = problem()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    quantize = Quantize(bits=BITS, group_size=64 if static else -1, act_order=True, static_groups=static)
    solved = gptq(weight, Curvature.of(hessian.clone(), 0.01, largest_first=True), quantize)
    plain = gptq(weight, Curvature.of(hessian.clone(), 0.01), Quantize(bits=BITS, group_size=64 if static else -1))
    assert solved.error < plain.error
    if not static:
        expected, error = by_definition(weight[:, order], hessian[order][:, order], size=None)
        assert agree(solved.weight[:, order], expected) and solved.error == pytest.approx(error, rel=1e-3)
        return
    assert torch.equal(solved.grids.group_of, torch.arange(600) // 64)
    alive = weight.clone()
    alive[:, [5, 200]] = 0
    assert torch.equal(solved.grids.scales, round_to_nearest(alive, Quantize(bits=BITS, group_size=64))[1].scales)


def test_gptq_keeps_pruned_weights():
    weight, x, hessian = problem()
    zeros = wanda_mask(weight, x.square().sum(0), Prune(method="wanda", pattern="2:4"))
    solved = gptq(weight.masked_fill(zeros, 0), Curvature.of(hessian, 0.01), Quantize(), zeros)
    assert (solved.weight[zeros] == 0).all() and (solved.weight[~zeros] != 0).float().mean() > 0.8


@pytest.mark.parametrize("quantize", [None, Quantize(bits=BITS)])
@pytest.mark.parametrize("prune", [Prune(sparsity=0.5), Prune(pattern="2:4")])
def test_sparsegpt_is_its_definition(prune, quantize):
    weight, _, hessian = problem()
    expected, error = by_definition(weight, hessian, size=None, prune=prune, quantize=quantize is not None)
    solved = sparsegpt(weight, Curvature.of(hessian, 0.01), prune, alone, quantize)
    assert agree(solved.weight, expected) and solved.error == pytest.approx(error, rel=1e-3)


def test_factor_of_second_moments():
    _, _, hessian = problem()
    expected, dead = inverse_factor(hessian)
    made = Curvature.of(hessian.clone(), 0.01)
    assert torch.equal(made.dead, dead) and int(dead.sum()) == 2
    assert torch.allclose(made.factor, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotPositiveDefiniteError, match=r"with a damping of 0\.01: raise it"):
        upper_factor(-torch.eye(4, dtype=torch.float64), 0.01)


def test_wanda_and_magnitude_masks():
    weight, x, _ = problem()
    norms = x.square().sum(0)
    scores = weight.abs() * norms.sqrt()
    mask = wanda_mask(weight, norms, Prune(method="wanda", sparsity=0.5))
    assert (mask.sum(1) == 300).all()
    assert all(scores[row][mask[row]].max() <= scores[row][~mask[row]].min() for row in range(24))
    mask = magnitude_mask(weight, Prune(method="magnitude", pattern="2:4"), alone)
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    mask = magnitude_mask(weight, Prune(method="magnitude", sparsity=0.3), alone)
    assert int(mask.sum()) == int(weight.numel() * 0.3) + 1


def test_kth_smallest_is_exact():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).abs()
    scores[3] = 0
    ordered = scores.flatten().sort().values
    assert all(kth_smallest(scores, k, alone) == float(ordered[k]) for k in (0, 3, 8, 174, 349))


def test_values_of_the_authors_programs():
    """Measured with IST-DASLab's quant.py and locuslab's rule on the embedded model's first layer."""
    checkpoint = open_checkpoint(EMBEDDED_DIRECTORY)
    weight = checkpoint.read("model.decoder.layers.0.self_attn.q_proj.weight").float()
    rounded, grids = round_to_nearest(weight, Quantize(method="rtn", bits=3))
    assert float(grids.scales[0, 0]) == pytest.approx(0.0350690558552742) and float(grids.zeros[0, 0]) == 3
    assert rounded[0, :4].tolist() == pytest.approx([0, 0, 0.07013811, 0.03506906])
    assert float((rounded - weight).square().mean()) == pytest.approx(1.19398e-4, rel=1e-5)
    zeros = magnitude_mask(weight, Prune(method="magnitude", sparsity=0.5), alone)
    assert 0.5 < float(zeros.float().mean()) < 0.5005  # half and one, and ties


def test_grids():
    weight = torch.tensor([[0.5, 1.0, 2.0], [0.0, 0.0, 0.0], [-3.0, 1.0, 0.0]])
    asymmetric, symmetric = (Grid.covering(weight, 2, symmetric=each) for each in (False, True))
    assert asymmetric.scale[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 4 / 3])
    assert asymmetric.zero[:, 0].tolist() == [0, 2, 2]
    assert symmetric.scale[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 2]) and (symmetric.zero == 2).all()
    assert (asymmetric.round(weight)[1] == 0).all()
    absmax = Grid.absmax(weight, 8)
    assert absmax.scale[2, 0] == pytest.approx(3 / 127) and absmax.round(weight)[2, 0] == -3
    assert torch.equal(absmax.round(absmax.round(weight)), absmax.round(weight))


def test_smoothing_factors():
    factors = smoothing_factors(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert factors.tolist() == pytest.approx([2.0, 1e-5])
