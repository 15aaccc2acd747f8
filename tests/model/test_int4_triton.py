"""The kernel of 4-bit weights, in Triton's interpreter; its bfloat16 product is not right, so float32 and float16."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":  # read while triton is imported, which Megatron-core may have done
    pytest.skip("TRITON_INTERPRET=1 runs these tests, in a process of their own", allow_module_level=True)
pytest.importorskip("triton", reason="comes with torch's builds for CUDA; pip install triton for the interpreter")

from opt_megatron.model.linear_methods.int4_groups import Int4Weight
from opt_megatron.model.linear_methods.int4_triton import Int4TritonLinear
from opt_megatron.model.linear_methods.registry import methods_for, select_method

# [tokens, inputs, outputs]: one token, one block, more than one, and sizes that no block and no group divides.
SHAPES = [(1, 48, 144), (7, 300, 65), (16, 128, 64), (33, 129, 65), (70, 33, 30)]


def test_it_is_chosen_on_a_gpu_of_nvidia(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    chosen = select_method("int4-g64", gpu, torch.float16)
    assert issubclass(chosen, Int4TritonLinear) and chosen.group_size == 64
    monkeypatch.setattr(torch.version, "cuda", None)
    assert Int4TritonLinear in methods_for("int4")
    assert select_method("int4", gpu, torch.float16) is not Int4TritonLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("relu", "has_residual"), [(False, False), (True, False), (False, True)])
def test_it_is_the_product_with_the_rounded_weights(shape, dtype, group_size, has_bias, relu, has_residual):
    tokens, inputs, outputs = shape
    generator = torch.Generator().manual_seed(inputs)
    x, weight, bias, residual = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((tokens, inputs), (outputs, inputs), (outputs,), (tokens, outputs))
    )
    numbers, scales, zeros = Int4Weight.rounded(weight, group_size)
    steps = numbers.double() - zeros.double().repeat_interleave(group_size, 1)
    rounded = (steps * scales.double().repeat_interleave(group_size, 1))[:, :inputs]
    expected = x.double() @ rounded.t()
    expected = expected + bias.double() if has_bias else expected
    expected = expected.relu() if relu else expected
    expected = expected + residual.double() if has_residual else expected
    given = x.clone(), bias.clone(), residual.clone()
    ours = Int4TritonLinear.with_group_size(group_size)(weight)(
        x, bias if has_bias else None, relu=relu, residual=residual if has_residual else None
    )
    assert ours.dtype is dtype
    rounding = {torch.float32: 1e-5, torch.float16: 2**-9}[dtype]  # weights are rounded to float16 too
    assert (ours - expected).abs().max() <= rounding * max(1.0, float(expected.abs().max()))
    assert all(map(torch.equal, given, (x, bias, residual)))  # nothing is written into what was given


def test_no_tokens_at_all():
    assert Int4TritonLinear(torch.randn(144, 48))(torch.empty(0, 48), None).shape == (0, 144)
