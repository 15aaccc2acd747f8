"""The products of inference against torch's linear."""

import pytest
import torch
from torch.nn.functional import linear

from opt_megatron.model.kernels import Int8, Packed, Plain, pack, quantize_rows

# [tokens, inputs, outputs]: one token and many, sizes that no vector of the processor divides.
SHAPES = [(1, 48, 144), (7, 48, 516), (33, 129, 65), (300, 64, 96)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(tokens: int, inputs: int, outputs: int, dtype=torch.float32):
    """Input, weight, bias and residual."""
    generator = torch.Generator().manual_seed(tokens + outputs)
    shapes = (tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def packed(weight: torch.Tensor) -> Packed:
    if not Packed.supports(weight):
        pytest.skip(f"this processor has no packed {weight.dtype}")
    return Packed(weight)


@pytest.mark.parametrize("kind", [Plain, packed, Int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_relu_and_residual(shape, kind):
    x, weight, bias, residual = drawn(*shape)
    product = kind(weight)
    given = x.clone(), bias.clone(), residual.clone()
    bare = product(x, None)
    assert torch.allclose(product(x, bias), bare + bias, atol=1e-4)
    assert torch.allclose(product(x, bias, relu=True), (bare + bias).relu(), atol=1e-4)
    assert torch.allclose(product(x, None, relu=True), bare.relu(), atol=1e-4)
    assert torch.allclose(product(x, bias, residual=residual), bare + bias + residual, atol=1e-4)
    assert torch.allclose(product(x, None, residual=residual), bare + residual, atol=1e-4)
    assert all(map(torch.equal, given, (x, bias, residual)))  # nothing is written into what was given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_is_linear(shape, dtype):
    x, weight, bias, _ = drawn(*shape, dtype)
    ours, exact = packed(weight)(x, bias), linear(x.double(), weight.double(), bias.double())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert ours.dtype is dtype
    assert (ours - exact).abs().max() <= rounding * exact.abs().max()


def test_packed_does_not_need_the_weight_any_more():
    x, weight, _, _ = drawn(5, 48, 144)
    product = pack(weight)
    expected = linear(x, weight)
    if isinstance(product, Plain):
        pytest.skip("this processor packs nothing")
    weight.zero_()
    assert torch.allclose(product(x, None), expected, atol=1e-4)


def test_what_cannot_be_packed_is_left_as_it_is():
    weight = torch.randn(8, 4, dtype=torch.float64)
    assert isinstance(pack(weight), Plain) and pack(weight).weight.data_ptr() == weight.data_ptr()


def test_quantised_rows_are_within_half_a_step():
    weight = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    weight[5] = 0
    numbers, scales = quantize_rows(weight)
    assert numbers.dtype is torch.int8 and numbers.abs().amax(1).tolist() == [127] * 5 + [0] + [127] * 34
    assert ((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    again, same = quantize_rows(numbers * scales[:, None])
    assert torch.equal(again, numbers) and torch.allclose(same, scales)


def bound(x: torch.Tensor, weight: torch.Tensor, levels: int) -> torch.Tensor:
    """[T, O]: the largest error that rounding both sides to the nearest step can make."""
    numbers, scales = quantize_rows(weight)
    rounded = (numbers * scales[:, None]).abs().sum(1)
    return x.abs().sum(1)[:, None] * scales / 2 + rounded * x.abs().amax(1)[:, None] / levels / 2


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_the_steps_of_both_sides(shape, dtype, positive):
    x, weight, bias, _ = drawn(*shape, dtype)
    x = x.relu() if positive else x
    product = Int8(weight)
    ours, exact = product(x, bias), linear(x.double(), weight.double(), bias.double())
    assert ours.dtype is dtype
    error, step = (ours - exact).abs(), bound(x.float(), weight.float(), product._levels)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert (error <= step + rounding * exact.abs().max()).all()
    # Errors of both signs cancel, so that typically they are far below the bound.
    relative = error.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert relative < (0.012 if product._levels == 127 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rounds_to_neither_side(dtype):
    x, weight, _, _ = drawn(300, 512, 64, dtype)
    weight = weight.abs()  # so that an error to one side adds up
    error = Int8(weight)(x, None) - linear(x.double(), weight.double())
    assert error.mean().abs() < 0.2 * error.pow(2).mean().sqrt()


def test_int8_rows_do_not_depend_on_each_other():
    x, weight, bias, _ = drawn(33, 64, 96)
    product = Int8(weight)
    alone = torch.cat([product(row[None], bias) for row in x])
    assert torch.equal(product(x, bias), alone)
    x[4] *= 1000
    others = [n for n in range(33) if n != 4]
    assert torch.equal(product(x, bias)[others], alone[others])
    x[4] = 0
    assert torch.equal(product(x, bias)[4], bias) and torch.equal(product(x, bias)[others], alone[others])


@pytest.mark.parametrize("kind", [Plain, packed, Int8])
def test_no_tokens_at_all(kind):
    x, weight, bias, _ = drawn(3, 48, 144)
    assert kind(weight)(x[:0], bias).shape == (0, 144)
