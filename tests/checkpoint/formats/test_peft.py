"""Adapters of peft, made from peft's documented layout alone, and (where it is installed) by peft and loaded by it."""

from pathlib import Path

import pytest
import torch
from checkpoint_samples import POST, POST_TENSORS, PRE, TENSORS
from formats import write_hf, write_peft
from safetensors.torch import load_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.errors import CheckpointError, UserError

D = "model.decoder."
QV = [
    "layers.0.self_attn.q_proj",
    "layers.0.self_attn.v_proj",
    "layers.1.self_attn.q_proj",
    "layers.1.self_attn.v_proj",
]


@pytest.fixture
def base(tmp_path):
    write_hf(tmp_path / "base", PRE, TENSORS)
    return tmp_path / "base"


def assert_merged(checkpoint, tensors, factors, scales):
    for name, tensor in tensors.items():
        expected = tensor.float()
        if name in factors:
            a, b = factors[name]
            expected = expected + scales[name.removeprefix(D).removesuffix(".weight")] * b @ a
        assert torch.allclose(checkpoint.read(name).float(), expected, atol=1e-5), name


# Fields of adapter_config.json, and the modules that they adapt: name -> (rank, scale).
READ = {
    "plain": ({}, dict.fromkeys(QV, (4, 2.0))),
    "peft's defaults": ({"target_modules": None, "r": 8, "lora_alpha": None}, dict.fromkeys(QV, (8, 1.0))),
    "rslora": ({"use_rslora": True}, dict.fromkeys(QV, (4, 4.0))),
    "pattern": ({"target_modules": r".*\.0\.(fc[12])"}, dict.fromkeys(["layers.0.fc1", "layers.0.fc2"], (4, 2.0))),
    "whole name": ({"target_modules": [f"{D}layers.1.fc2"]}, {"layers.1.fc2": (4, 2.0)}),
    "exclude_modules": ({"exclude_modules": ["0.self_attn.q_proj", "v_proj"]}, {QV[2]: (4, 2.0)}),
    "layers_to_transform": (
        {"target_modules": ["out_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers.1.self_attn.out_proj": (4, 2.0)},
    ),
    "whole names are of any layer": (
        {"target_modules": [f"{D}layers.1.fc2", "fc1"], "layers_to_transform": [0]},
        {"layers.0.fc1": (4, 2.0), "layers.1.fc2": (4, 2.0)},
    ),
    "one layer": ({"target_modules": ["fc1"], "layers_to_transform": 0}, {"layers.0.fc1": (4, 2.0)}),
    "rank_pattern, alpha_pattern": (
        {"rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 1}, "alpha_pattern": {f"{D}{QV[0]}": 3}},
        {QV[0]: (4, 0.75), QV[1]: (2, 4.0), QV[2]: (1, 8.0), QV[3]: (2, 4.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "modules"), READ.values(), ids=READ)
def test_each_module_gets_its_rank_and_scale(base, tmp_path, fields, modules):
    ranks, scales = ({name: pair[index] for name, pair in modules.items()} for index in (0, 1))
    factors = write_peft(tmp_path / "adapter", TENSORS, ranks, **fields)
    assert_merged(open_checkpoint(base, adapter=tmp_path / "adapter"), TENSORS, factors, scales)


def test_all_linear_layers_are_those_of_350m_too(tmp_path):
    write_hf(tmp_path / "base", POST, POST_TENSORS)
    names = [name.removeprefix(D) for name, tensor in POST_TENSORS.items() if tensor.dim() == 2 and "embed" not in name]
    ranks = {name.removesuffix(".weight"): 4 for name in names}
    assert "project_in" in ranks and len(ranks) == 14
    factors = write_peft(tmp_path / "adapter", POST_TENSORS, ranks, target_modules="all-linear")
    checkpoint = open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    assert_merged(checkpoint, POST_TENSORS, factors, dict.fromkeys(ranks, 2.0))


def test_the_older_pickle_is_read_too(base, tmp_path):
    factors = write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_merged(open_checkpoint(base, adapter=tmp_path / "adapter"), TENSORS, factors, dict.fromkeys(QV, 2.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"use_dora": True}, "use_dora is true"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]'),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["fc1.weight"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"megatron_config": {"hidden_size": 12}}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights is "pissa_niter_4"'),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"of_a_later_version": 1}, "of_a_later_version is 1"),
        ({"target_modules": ["q_proj", "lm_head"]}, "includes lm_head"),
        ({"target_modules": ["embed_tokens"]}, "includes model.decoder.embed_tokens"),
        ({"target_modules": "(a+)+$("}, "is not a regular expression"),
        ({"target_modules": [1]}, "neither a text nor a list"),
        ({"rank_pattern": [3]}, "rank_pattern"),
        ({"r": 0}, "rank of model.decoder.layers.0.self_attn.q_proj is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"r": 2}, r"lora_A is \[4, 12\] .* say \[2, 12\]"),
        ({"target_modules": ["q_proj", "fc1"]}, "adapts model.decoder.layers.0.fc1, but .*fc1.lora_A.*not in"),
        ({"target_modules": ["q_proj"]}, "4 keys belong to no module"),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, "4 keys belong to no module"),
        ({"target_modules": []}, "8 keys belong to no module"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(base, tmp_path, fields, message):
    write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4), **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("prefix", ["base_model.model.decoder.", "model.decoder.", ""])
def test_a_wrong_prefix_is_an_error_and_not_the_base_model(base, tmp_path, prefix):
    write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4), prefix=prefix)
    with pytest.raises(CheckpointError, match=rf"lora_A.weight is not in .*; it has {prefix}layers"):
        open_checkpoint(base, adapter=tmp_path / "adapter")


def test_an_adapter_is_no_model_and_a_model_no_adapter(base, tmp_path):
    write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4), base_model_name_or_path="facebook/opt-125m")
    with pytest.raises(CheckpointError, match=r"is an adapter of peft .* --load facebook/opt-125m --adapter"):
        open_checkpoint(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"there is no adapter_config.json"):
        open_checkpoint(base, adapter=base)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model.safetensors nor"):
        open_checkpoint(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(("fields", "modules"), READ.values(), ids=READ)
def test_what_is_written_is_what_was_read(base, tmp_path, fields, modules):
    factors = write_peft(tmp_path / "adapter", TENSORS, {name: rank for name, (rank, _) in modules.items()}, **fields)
    convert(base, tmp_path / "again", ConversionOptions(to="peft"), adapter=tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    scales = {name: scale for name, (_, scale) in modules.items()}
    assert_merged(open_checkpoint(base, adapter=tmp_path / "again"), TENSORS, factors, scales)


def test_adapters_are_replaced_and_models_without_factors_refused(base, tmp_path):
    write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4))
    options = ConversionOptions(to="peft", dtype="bfloat16")
    for force in (False, True):
        convert(base, tmp_path / "out", options, adapter=tmp_path / "adapter", force=force)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="--force replaces it"):
        convert(base, tmp_path / "out", options, adapter=tmp_path / "adapter")
    with pytest.raises(UserError, match="has no LoRA factors to write"):
        convert(base, tmp_path / "new", options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="whole tensors"):
        ConversionOptions(to="peft", tensor_model_parallel_size=2)


def test_a_merged_conversion_stays_in_the_dtype_of_the_base(base, tmp_path):
    factors = write_peft(tmp_path / "adapter", TENSORS, dict.fromkeys(QV, 4))
    convert(base, tmp_path / "out", ConversionOptions(to="hf"), adapter=tmp_path / "adapter")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    a, b = factors[f"{D}{QV[0]}.weight"]
    expected = (TENSORS[f"{D}{QV[0]}.weight"].float() + 2 * b @ a).half()
    assert torch.equal(stored[f"{D}{QV[0]}.weight"], expected)


@pytest.mark.parametrize("fields", [
    {"r": 4, "target_modules": "all-linear", "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "fc1", "fc2", "v_proj"], "layers_to_transform": [1],
     "rank_pattern": {"fc2": 2}, "alpha_pattern": {r"1\.fc1": 3}},
])  # fmt: skip
def test_peft_and_this_package_give_the_same_logits(alone, models, tmp_path, fields):
    """Adapters that peft made, and what is written of them, loaded by peft again without a missing key."""
    peft = pytest.importorskip("peft", reason="peft, whose adapters are compared with, is not installed")
    from opt_megatron import OPT

    directory, model = models["post-norm"]
    torch.manual_seed(3)
    adapted = peft.get_peft_model(_copy(directory), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "made")
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        wanted, base = adapted(tokens).logits, model(tokens).logits
    assert (wanted - base).abs().max() > 0.1
    got = OPT.open(str(directory), alone, adapter=str(tmp_path / "made")).logits(tokens)
    assert (got - wanted).abs().max() <= 1e-4
    convert(directory, tmp_path / "written", ConversionOptions(to="peft"), adapter=tmp_path / "made")
    again = peft.PeftModel.from_pretrained(_copy(directory), tmp_path / "written").eval()
    with torch.no_grad():
        assert (again(tokens).logits - wanted).abs().max() <= 1e-4


def _copy(directory: Path):
    from transformers import OPTForCausalLM

    return OPTForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
