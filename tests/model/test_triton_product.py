"""The kernels of 8-bit and 4-bit weights, in Triton's interpreter; its bfloat16 product is not right, so float32 and
float16."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # read while triton is imported, which Megatron-core may have done
    pytest.skip("TRITON_INTERPRET=1 runs these tests, in a process of their own", allow_module_level=True)
pytest.importorskip("triton", reason="comes with torch's builds for CUDA; pip install triton for the interpreter")

from opt_megatron.model.linear_methods.int4_groups import Int4Weight
from opt_megatron.model.linear_methods.int4_triton import Int4TritonLinear
from opt_megatron.model.linear_methods.int8_rows import quantize_rows
from opt_megatron.model.linear_methods.int8_triton import Int8TritonLinear
from opt_megatron.model.linear_methods.registry import methods_for, select_method

# [tokens, inputs, outputs]: one token, one block, more than one, and sizes that no block and no group divides.
SHAPES = [(1, 48, 144), (7, 300, 65), (16, 128, 64), (33, 129, 65), (130, 64, 96), (70, 33, 30)]
GROUP_SIZES = {f"int4-g{size}": size for size in (32, 64, 128)}
METHODS = {"int8": Int8TritonLinear} | {
    name: Int4TritonLinear.with_group_size(size) for name, size in GROUP_SIZES.items()
}


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """The float64 weight that the quantised one stands for."""
    if name == "int8":
        numbers, scales = quantize_rows(weight)
        return numbers.double() * scales.double()[:, None]
    numbers, *by_group = Int4Weight.rounded(weight, GROUP_SIZES[name])
    scales, zeros = (each.double().repeat_interleave(GROUP_SIZES[name], 1) for each in by_group)
    return ((numbers.double() - zeros) * scales)[:, : weight.shape[1]]


@pytest.mark.parametrize(("name", "method"), [("int8", Int8TritonLinear), ("int4", Int4TritonLinear)])
def test_it_is_chosen_on_a_gpu_of_nvidia(monkeypatch, name, method):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert select_method(name, gpu, torch.float16) is method
    with_groups = select_method("int4-g64", gpu, torch.float16)
    assert issubclass(with_groups, Int4TritonLinear) and with_groups.group_size == 64
    monkeypatch.setattr(torch.version, "cuda", None)
    assert method in methods_for(name)
    assert select_method(name, gpu, torch.float16) is not method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("relu", "has_residual"), [(False, False), (True, False), (False, True)])
def test_it_is_the_product_with_the_rounded_weights(shape, dtype, name, has_bias, relu, has_residual):
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    )
    expected = x.double() @ rounded(weight, name).t()
    expected = expected + bias.double() if has_bias else expected
    expected = expected.relu() if relu else expected
    expected = expected + residual.double() if has_residual else expected
    given = x.clone(), bias.clone(), residual.clone()
    ours = METHODS[name](weight)(x, bias if has_bias else None, relu=relu, residual=residual if has_residual else None)
    assert ours.dtype is dtype
    # 4-bit weights are rounded to float16 too, after they were scaled.
    rounding = {torch.float32: 1e-5, torch.float16: 2**-10 if name == "int8" else 2**-9}[dtype]
    assert (ours - expected).abs().max() <= rounding * max(1.0, float(expected.abs().max()))
    assert all(map(torch.equal, given, (x, bias, residual)))  # nothing is written into what was given


def test_sums_do_not_exceed_float16():
    weight, x = torch.full((3, 4096), 0.01), torch.full((2, 4096), 0.5, dtype=torch.float16)
    output = Int8TritonLinear(weight.half())(x, None)  # 127 * 0.5 * 4096 is beyond its range
    assert torch.allclose(output.float(), torch.full((2, 3), 0.01 * 0.5 * 4096), rtol=0.01)


@pytest.mark.parametrize("method", [Int8TritonLinear, Int4TritonLinear])
def test_no_tokens_at_all(method):
    assert method(torch.randn(144, 48))(torch.empty(0, 48), None).shape == (0, 144)
