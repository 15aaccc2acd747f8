"""The linear methods against torch's linear, their table, and the way back to the float weights."""

import pytest
import torch
from torch.nn.functional import linear

from opt_megatron.errors import UserError
from opt_megatron.model.linear_methods.base import LinearMethod
from opt_megatron.model.linear_methods.cpu_float import CPUFloatLinear
from opt_megatron.model.linear_methods.cpu_int4 import CPUInt4Linear
from opt_megatron.model.linear_methods.cpu_int8 import CPUInt8Linear
from opt_megatron.model.linear_methods.equalization import equalize_columns, multiplied
from opt_megatron.model.linear_methods.int4_groups import Int4Weight
from opt_megatron.model.linear_methods.int4_weight_only import Int4WeightOnlyLinear
from opt_megatron.model.linear_methods.int8 import Int8Linear
from opt_megatron.model.linear_methods.int8_rows import Int8Rows, quantize_rows
from opt_megatron.model.linear_methods.int8_weight_only import Int8WeightOnlyLinear
from opt_megatron.model.linear_methods.onednn import OneDNNLinear
from opt_megatron.model.linear_methods.registry import (
    METHODS,
    Quantization,
    methods_for,
    quantization_help,
    quantizations,
    select_method,
    with_group_size,
)
from opt_megatron.model.linear_methods.torch_linear import TorchLinear

# [tokens, inputs, outputs]: one token and many, sizes that no vector of the processor divides.
SHAPES = [(1, 48, 144), (7, 48, 516), (33, 129, 65), (300, 64, 96)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(tokens: int, inputs: int, outputs: int, dtype=torch.float32):
    """Input, weight, bias and residual."""
    generator = torch.Generator().manual_seed(tokens + outputs)
    shapes = (tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def onednn(weight: torch.Tensor) -> OneDNNLinear:
    if not OneDNNLinear.is_available(weight.device, weight.dtype):
        pytest.skip(f"this processor has no packed {weight.dtype}")
    return OneDNNLinear(weight)


def compiled(method: type[LinearMethod]):
    """The method, where the CPU kernels were compiled."""

    def make(weight: torch.Tensor) -> LinearMethod:
        if not method.is_available(weight.device, weight.dtype):
            pytest.skip("there are no CPU kernels here")
        return method(weight)

    return make


KINDS = [TorchLinear, onednn, compiled(CPUFloatLinear), Int8Linear, Int8WeightOnlyLinear, compiled(CPUInt8Linear)]
KINDS += [Int4WeightOnlyLinear, Int4WeightOnlyLinear.with_group_size(32), compiled(CPUInt4Linear.with_group_size(64))]


@pytest.mark.parametrize("kind", KINDS)
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
def test_onednn_is_linear(shape, dtype):
    x, weight, bias, _ = drawn(*shape, dtype)
    ours, exact = onednn(weight)(x, bias), linear(x.double(), weight.double(), bias.double())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert ours.dtype is dtype
    assert (ours - exact).abs().max() <= rounding * exact.abs().max()


def test_onednn_does_not_refer_to_the_weight():
    x, weight, _, _ = drawn(5, 48, 144)
    product, expected = onednn(weight), linear(x, weight)
    weight.zero_()
    assert torch.allclose(product(x, None), expected, atol=1e-4)


def test_methods_are_chosen_by_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)  # with a build for CUDA, it is test_triton_product.py's
    cpu = torch.device("cpu")
    assert select_method(None, cpu, torch.float64) is TorchLinear
    assert select_method(None, torch.device("cuda"), torch.float32) is TorchLinear
    assert select_method("int8", torch.device("cuda"), torch.float16) is Int8WeightOnlyLinear
    by_preference = [m for m in (CPUFloatLinear, OneDNNLinear, TorchLinear) if m.is_available(cpu, torch.float32)]
    assert select_method(None, cpu, torch.float32) is by_preference[0]
    for wrong in ("int5", "int4-g48", "int4-g", "int8-g64"):
        with pytest.raises(UserError, match=f"'{wrong}': choose {', '.join(quantizations())}, int4-g32, .* or none"):
            select_method(wrong, cpu, torch.float32)


def test_a_method_that_no_device_here_has(monkeypatch):
    monkeypatch.setitem(METHODS, "blocked", Quantization("blocked weights", ("onednn.OneDNNLinear",)))
    assert "blocked" in quantizations()
    assert f"int8: {METHODS['int8'].help}. " in quantization_help()
    assert quantization_help().endswith(". blocked: blocked weights")
    with pytest.raises(UserError, match=r"'blocked' is not available for torch\.float32 on cuda"):
        select_method("blocked", torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in METHODS for method in methods_for(name)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 7), (1, 1, 1)])
def test_the_weight_comes_back_to_the_bit_or_not_at_all(shape, dtype, name, method):
    weight = drawn(*shape, dtype)[1]
    if not method.is_available(weight.device, dtype):
        pytest.skip(f"this processor has no {method.__name__} for {dtype}")
    stored = method(weight.clone())
    if name is not None:  # a quantisation
        with pytest.raises(UserError, match="load it without quantization to read or change weights"):
            stored.unpack()
    else:
        assert torch.equal(stored.unpack(), weight) and stored.unpack().dtype is dtype


def test_the_group_size_is_part_of_the_name():
    assert with_group_size("int4", 64) == "int4-g64" and with_group_size("int8", None) == "int8"
    assert select_method("int4-g64", torch.device("cuda"), torch.float16).group_size == 64
    assert select_method("int4", torch.device("cuda"), torch.float16).group_size == 128
    for other in ("int8", None):
        with pytest.raises(UserError, match=rf"a group size needs a quantization with groups \(int4\), not {other}"):
            with_group_size(other, 64)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bit_weights_are_within_half_a_step_and_zero_is_kept(group_size):
    weight = torch.randn(20, 300) * torch.logspace(-3, 3, 20)[:, None]
    weight[3], weight[4, :150], weight[5] = 0, 0, weight[5].abs() + 1
    numbers, scales, zeros = Int4Weight.rounded(weight, group_size)
    assert numbers.shape == (20, -(-300 // group_size) * group_size) and numbers.max() <= 15
    steps = scales.repeat_interleave(group_size, 1)
    rounded = (numbers.float() - zeros.repeat_interleave(group_size, 1)) * steps
    assert ((rounded[:, :300] - weight).abs() <= steps[:, :300] * 1.0001).all()  # half a step, and half of the zero's
    assert (rounded[:, :300][weight == 0] == 0).all() and (rounded[:, 300:] == 0).all()


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_kernel_and_torch_compute_with_the_same_4_bit_weights(group_size):
    x, weight, bias, _ = drawn(7, 200, 70)
    if not CPUInt4Linear.is_available(weight.device, weight.dtype):
        pytest.skip("there are no CPU kernels here")
    exact = Int4WeightOnlyLinear.with_group_size(group_size)(weight)(x, bias)
    ours = CPUInt4Linear.with_group_size(group_size)(weight)(x, bias)
    assert (ours - exact).norm() <= 0.01 * exact.norm()  # the kernel rounds activations to 8 bits


def test_columns_far_from_the_others_are_equalised():
    weight = torch.randn(40, 64)
    weight[:, 3] = 0
    same, factors = equalize_columns(weight)
    assert same is weight and factors is None
    weight[:, 5] *= 100
    weight[:, 6] /= 100
    x = torch.randn(7, 64)
    equal, factors = equalize_columns(weight)
    assert factors[factors != 1].numel() == 2 and factors[5] > 50 and factors[6] < 1 / 50
    assert torch.allclose(multiplied(x, factors) @ equal.T, x @ weight.T, atol=1e-3)


def test_8_bit_rows_of_an_embedding():
    weight = torch.randn(40, 64)
    rows = Int8Rows(weight)
    numbers, scales = quantize_rows(weight)
    assert torch.equal(rows.table(), numbers * scales[:, None])
    assert torch.equal(rows[torch.tensor([[3, 0]])], rows.table()[[3, 0]][None])


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
    product = Int8Linear(weight)
    ours, exact = product(x, bias), linear(x.double(), weight.double(), bias.double())
    assert ours.dtype is dtype
    error, step = (ours - exact).abs(), bound(x.float(), weight.float(), product.levels)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert (error <= step + rounding * exact.abs().max()).all()
    # Errors of both signs cancel, so that typically they are far below the bound.
    relative = error.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert relative < (0.012 if product.levels == 127 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rounds_to_neither_side(dtype):
    x, weight, _, _ = drawn(300, 512, 64, dtype)
    weight = weight.abs()  # so that an error to one side adds up
    error = Int8Linear(weight)(x, None) - linear(x.double(), weight.double())
    assert error.mean().abs() < 0.2 * error.pow(2).mean().sqrt()


def test_int8_rows_do_not_depend_on_each_other():
    x, weight, bias, _ = drawn(33, 64, 96)
    product = Int8Linear(weight)
    alone = torch.cat([product(row[None], bias) for row in x])
    assert torch.equal(product(x, bias), alone)
    x[4] *= 1000
    others = [n for n in range(33) if n != 4]
    assert torch.equal(product(x, bias)[others], alone[others])
    x[4] = 0
    assert torch.equal(product(x, bias)[4], bias) and torch.equal(product(x, bias)[others], alone[others])


@pytest.mark.parametrize("kind", [TorchLinear, onednn, Int8Linear, Int8WeightOnlyLinear])
def test_no_tokens_at_all(kind):
    x, weight, bias, _ = drawn(3, 48, 144)
    assert kind(weight)(x[:0], bias).shape == (0, 144)


def test_sums_of_8_bit_weights_do_not_exceed_float16():
    weight, x = torch.full((3, 4096), 0.01), torch.full((2, 4096), 0.5, dtype=torch.float16)
    output = Int8WeightOnlyLinear(weight.half())(x, None)  # 127 * 0.5 * 4096 is beyond its range
    assert torch.allclose(output.float(), torch.full((2, 3), 0.01 * 0.5 * 4096), rtol=0.01)
