"""The kernel of 8-bit weights, in Triton's interpreter; its bfloat16 product is not right, so float32 and float16."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # read while triton is imported, which Megatron-core may have done
    pytest.skip("TRITON_INTERPRET=1 runs these tests, in a process of their own", allow_module_level=True)
pytest.importorskip("triton", reason="comes with torch's builds for CUDA; pip install triton for the interpreter")

from opt_megatron.model.linear_methods.int8_rows import quantize_rows
from opt_megatron.model.linear_methods.int8_triton import Int8TritonLinear
from opt_megatron.model.linear_methods.registry import methods_for, select_method

# [tokens, inputs, outputs]: one token, one block, more than one, and sizes that no block divides.
SHAPES = [(1, 48, 144), (7, 300, 65), (16, 128, 64), (33, 129, 65), (130, 64, 96)]


def test_it_is_chosen_on_a_gpu_of_nvidia(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert select_method("int8", gpu, torch.float16) is Int8TritonLinear
    monkeypatch.setattr(torch.version, "cuda", None)
    assert Int8TritonLinear in methods_for("int8")
    assert select_method("int8", gpu, torch.float16) is not Int8TritonLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("relu", "has_residual"), [(False, False), (True, False), (False, True)])
def test_it_is_the_product_with_the_rounded_weights(shape, dtype, has_bias, relu, has_residual):
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    )
    numbers, scales = quantize_rows(weight)
    expected = x.double() @ (numbers.double() * scales.double()[:, None]).t()
    expected = expected + bias.double() if has_bias else expected
    expected = expected.relu() if relu else expected
    expected = expected + residual.double() if has_residual else expected
    given = x.clone(), bias.clone(), residual.clone()
    ours = Int8TritonLinear(weight)(
        x, bias if has_bias else None, relu=relu, residual=residual if has_residual else None
    )
    assert ours.dtype is dtype
    rounding = {torch.float32: 1e-5, torch.float16: 2**-10}[dtype]
    assert (ours - expected).abs().max() <= rounding * max(1.0, float(expected.abs().max()))
    assert all(map(torch.equal, given, (x, bias, residual)))  # nothing is written into what was given


def test_sums_do_not_exceed_float16():
    weight, x = torch.full((3, 4096), 0.01), torch.full((2, 4096), 0.5, dtype=torch.float16)
    output = Int8TritonLinear(weight.half())(x, None)  # 127 * 0.5 * 4096 is beyond its range
    assert torch.allclose(output.float(), torch.full((2, 3), 0.01 * 0.5 * 4096), rtol=0.01)


def test_no_tokens_at_all():
    assert Int8TritonLinear(torch.randn(144, 48))(torch.empty(0, 48), None).shape == (0, 144)
