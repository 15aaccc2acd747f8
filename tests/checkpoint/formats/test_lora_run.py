"""lora.json says what the factors beside a run's weights are."""

import json

import pytest
import torch
from checkpoint_samples import OPT_CONFIG

from opt_megatron.checkpoint.formats.lora_run import LORA_FILE, lora_file_text, run_adapter
from opt_megatron.checkpoint.storage.blocks import whole
from opt_megatron.checkpoint.storage.lazy_tensor import wrap_tensor
from opt_megatron.errors import CheckpointError
from opt_megatron.model.lora_options import LoRALayer, LoRAOptions

QKV = "decoder.layers.1.self_attention.linear_qkv"
OLD = {"rank": 2, "alpha": 3.0, "target_modules": ["linear_qkv"]}


def stored(layers, rank):
    """Random factors of linear_qkv in these layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_a": (rank, 12), "lora_b": (36, rank)}
    return {
        f"decoder.layers.{layer}.self_attention.linear_qkv.{name}": wrap_tensor(torch.randn(shape, generator=generator))
        for layer in layers
        for name, shape in shapes.items()
    }


def test_q_k_and_v_share_a_and_files_of_earlier_versions_are_read(tmp_path):
    found = []
    for text in (json.dumps(OLD), lora_file_text(LoRAOptions(2, 3.0, ("linear_qkv",)).layers(2), "facebook/opt-125m")):
        (tmp_path / LORA_FILE).write_text(text)
        found.append(run_adapter(tmp_path, OPT_CONFIG, stored((0, 1), 2)))
    assert [adapter.base_model for adapter in found] == [None, "facebook/opt-125m"]
    for adapter in found:
        assert len(adapter.factors) == 6
        assert {(factors.rank, factors.scale) for factors in adapter.factors.values()} == {(2, 1.5)}


def test_a_of_q_and_v_are_rows_and_b_of_a_head_is_interleaved(tmp_path):
    (tmp_path / LORA_FILE).write_text(lora_file_text({QKV: LoRALayer(0.5, (1, 0, 3))}, None))
    tensors = stored((1,), 4)
    factors = run_adapter(tmp_path, OPT_CONFIG, tensors).factors
    a, b = (tensors[f"{QKV}.{name}"].read(whole(tensors[f"{QKV}.{name}"].shape)) for name in ("lora_a", "lora_b"))
    assert [name.split(".")[-2] for name in factors] == ["q_proj", "v_proj"]
    of_v = factors["model.decoder.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(of_v.a.read(whole(of_v.a.shape)), a[1:])
    assert torch.equal(of_v.b.read(whole(of_v.b.shape)), b.view(4, 3, 3, 4)[:, 2, :, 1:].reshape(12, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not say what LoRA adapts"),
        (json.dumps(OLD | {"rank": 0}), "does not say what LoRA adapts"),
        (json.dumps({"layers": {QKV: {"scale": float("inf"), "ranks": [2]}}}), "does not say what LoRA adapts"),
        (json.dumps({"layers": {QKV: {"scale": 1, "ranks": [True]}}}), "does not say what LoRA adapts"),
        (json.dumps({"layers": {QKV: {"scale": 1, "ranks": [3]}}}), "are missing, or not as lora.json says"),
        (json.dumps({"layers": {}}), r"does not describe .*linear_qkv.lora_a"),
        (json.dumps(OLD), r"linear_qkv are missing"),  # of layer 0
    ],
)
def test_what_does_not_fit_the_factors_is_refused(tmp_path, text, message):
    (tmp_path / LORA_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        run_adapter(tmp_path, OPT_CONFIG, stored((1,), 2))
