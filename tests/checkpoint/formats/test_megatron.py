"""Megatron's directories: at any layout, from Megatron-LM and for it."""

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from checkpoint_samples import OPT_CONFIG, PRE, TENSORS, assert_holds, assert_same, contents, megatron
from factory import divides
from formats import hf_config, load, random_tensors, save, write_hf, write_megatron_lm
from safetensors.torch import load_file

from opt_megatron.checkpoint.compare import differences_from_manifest
from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.infer_config import ACTIVATION_IS_ASSUMED
from opt_megatron.checkpoint.formats.megatron_ranks import pipeline_stages
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.manifest import MANIFEST
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError, UserError


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (6, 1), (1, 3), (1, 4), (3, 4), (2, 12)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_every_megatron_layout_keeps_every_bit(models, tmp_path, name, tp, pp):
    source, model = models[name]
    if not divides(model, 1, pp):
        pytest.skip("the layout does not divide this model")
    convert(source, tmp_path / "converted", megatron(tp, pp), fsync=False)
    assert_same(contents(source), contents(tmp_path / "converted"))


def test_files_are_megatron_lms(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2, 2))
    target = tmp_path / "c"
    assert (target / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    ranks = sorted(path.name for path in (target / "release").iterdir())
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    file = torch.load(target / "release" / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=False)
    assert file["checkpoint_version"] == 3.0
    assert (file["args"].num_layers, file["args"].tensor_model_parallel_size) == (4, 2)
    assert all(isinstance(value, int | float | str | bool) for value in vars(file["args"]).values())
    # The last stage numbers its layers from 0 and carries the tied head.
    assert file["model"]["output_layer.weight"].shape == (4096 // 2, 256)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in file["model"]
    for name in ("config.json", "vocab.json", "merges.txt", MANIFEST):
        assert (target / name).is_file()


def test_megatron_qkv_is_rebuilt_from_the_source_by_hand(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), fsync=False)
    stored = load_file(EMBEDDED_DIRECTORY / "model.safetensors")
    layer = "model.decoder.layers.2.self_attn."
    heads = [stored[f"{layer}{name}_proj.weight"].view(8, 32, 256) for name in "qkv"]
    expected = torch.cat([heads[part][head] for head in range(4, 8) for part in range(3)])
    file = torch.load(tmp_path / "c" / "release" / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert torch.equal(file["model"]["decoder.layers.2.self_attention.linear_qkv.weight"], expected)


def test_uneven_pipeline_stages(tmp_path):
    config = hf_config(num_hidden_layers=7)
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    options = megatron(2, 3, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=2)
    convert(tmp_path / "source", tmp_path / "uneven", options, fsync=False)
    assert_same(tensors, contents(tmp_path / "uneven"))
    with pytest.raises(UserError, match="7 layers cannot be divided into 3 pipeline stages: 7 % 3 = 1"):
        convert(tmp_path / "source", tmp_path / "refused", megatron(1, 3))


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((6, 3), [range(0, 2), range(2, 4), range(4, 6)]),
        ((7, 3, 1), [range(0, 1), range(1, 4), range(4, 7)]),
        ((7, 2, 3, 4), [range(0, 3), range(3, 7)]),
        ((5, 1), [range(0, 5)]),
    ],
)
def test_pipeline_stages(arguments, stages):
    assert pipeline_stages(*arguments) == stages


@pytest.mark.parametrize("arguments", [(6, 4), (7, 2, 3, 3), (7, 3, 0), (7, 3, 6, 1), (3, 4)])
def test_layers_that_cannot_be_divided(arguments):
    with pytest.raises(UserError, match="cannot be divided"):
        pipeline_stages(*arguments)


POSITIONS = "model.decoder.embed_positions.weight"


@pytest.mark.parametrize("seq_length", [None, 4, 8])
def test_a_table_without_opts_two_unused_rows_gets_them_back(tmp_path, seq_length):
    config = hf_config(vocab_size=32)  # needs no padding at TP2
    tensors = random_tensors(config)
    tensors[POSITIONS][:2] = 0
    short = tensors | {POSITIONS: tensors[POSITIONS][2:].clone()}
    write_megatron_lm(tmp_path, config, short, 2, 1)
    if seq_length is not None:
        rewrite_arguments(tmp_path, seq_length=seq_length)
    assert_holds(tmp_path, tensors, OPTConfig.from_hf(config))
    assert assert_holds(tmp_path, tensors).config.max_position_embeddings == 8
    write_megatron_lm(tmp_path, hf_config(vocab_size=32, max_position_embeddings=6), short, 2, 1)
    rewrite_arguments(tmp_path, seq_length=6)  # 8 rows for 6 positions: OPT's table
    assert open_checkpoint(tmp_path).config.max_position_embeddings == 6


@pytest.mark.parametrize("with_config", [True, False])
def test_a_table_without_the_unused_rows_is_written_for_position_ids_from_0(tmp_path, capsys, with_config):
    options = megatron(2, 2, position_offset=0)
    summary = convert(EMBEDDED_DIRECTORY, tmp_path / "c", options, fsync=False)
    assert "position ids begin at 0, and the activation is ReLU" in summary.notes[0]
    file = torch.load(tmp_path / "c" / "release" / "mp_rank_01_000" / "model_optim_rng.pt", weights_only=False)
    source = load_file(EMBEDDED_DIRECTORY / "model.safetensors")[POSITIONS]
    assert torch.equal(file["model"]["embedding.position_embeddings.weight"], source[2:])
    assert file["args"].max_position_embeddings == 512
    if not with_config:
        (tmp_path / "c" / "config.json").unlink()
    assert torch.equal(contents(tmp_path / "c")[POSITIONS], torch.cat([torch.zeros_like(source[:2]), source[2:]]))
    assert not differences_from_manifest(open_checkpoint(tmp_path / "c"), workers=1)
    with pytest.raises(UserError, match=r"--position-offset is 0, but must be 2 with --to hf"):
        ConversionOptions(to="hf", position_offset=0)
    with pytest.raises(UserError, match=r"must be 0 or 2 with --to megatron"):
        megatron(1, position_offset=1)


def test_a_conversion_says_where_positions_begin(tmp_path):
    [note] = convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), fsync=False).notes
    assert "position ids begin at 2 (add 2 to its own, or write with --position-offset 0)" in note


def test_a_virtual_pipeline_is_put_in_the_order_of_its_layers(tmp_path):
    """8 layers, PP 2, 2 chunks: the first stage has layers 0-1 and 4-5, the second 2-3 and 6-7."""
    config = hf_config(num_hidden_layers=8)
    tensors = random_tensors(config)
    write_megatron_lm(tmp_path, config, tensors, 2, 4)
    iteration = tmp_path / "iter_0001000"
    for rank in range(2):
        for stage in range(2):
            first, second = (iteration / f"mp_rank_0{rank}_00{s}" / "model_optim_rng.pt" for s in (stage, stage + 2))
            content = load(first)
            save(content | {"model0": content.pop("model"), "model1": load(second)["model"]}, first)
            shutil.rmtree(second.parent)
    checkpoint = assert_holds(tmp_path, tensors, OPTConfig.from_hf(config))
    assert checkpoint.format_description == "Megatron TP2 x PP2, virtual pipeline of 2 chunks"
    assert [what.split(",")[0] for _, what in checkpoint.ranks] == ["layers 0-1 and 4-5"] * 2 + [
        "layers 2-3 and 6-7"
    ] * 2
    content = load(iteration / "mp_rank_01_001" / "model_optim_rng.pt")
    save(content | {"model": content.pop("model0")}, iteration / "mp_rank_01_001" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=r"the ranks hold \[1, 2\] chunks of a virtual pipeline"):
        open_checkpoint(tmp_path, OPTConfig.from_hf(config))


@pytest.mark.parametrize("beside", ["tracker", "ranks"])
def test_the_directory_of_one_iteration_is_read(tmp_path, beside):
    write_megatron_lm(tmp_path, PRE, TENSORS, 2, 1)
    config_at = tmp_path if beside == "tracker" else tmp_path / "iter_0001000"
    (config_at / "config.json").write_text(json.dumps(PRE))
    assert_holds(tmp_path / "iter_0001000", TENSORS)
    assert_holds(tmp_path, TENSORS)


def test_ranks_of_another_model_are_found_when_they_are_read(tmp_path):
    write_megatron_lm(tmp_path / "a", PRE, TENSORS, 2, 1)
    write_megatron_lm(tmp_path / "b", PRE, random_tensors(PRE, seed=9), 2, 1)
    file = "iter_0001000/mp_rank_01/model_optim_rng.pt"
    shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with pytest.raises(CheckpointError, match=r"is not the same in parts 0 and 1"):
        open_checkpoint(tmp_path / "a", OPT_CONFIG).read("model.decoder.final_layer_norm.weight")


def rewrite_arguments(directory, **changes):
    """Change the arguments in every rank's file."""
    for path in directory.rglob("model_optim_rng.pt"):
        content = load(path)
        vars(content["args"]).update(changes)
        save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"squared_relu": True}, "squared_relu=True; in OPT it is False"),
        ({"activation_func": "gelu"}, "activation_func='gelu'; in OPT it is 'relu'"),
        ({"normalization": "RMSNorm"}, "normalization='RMSNorm'"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon=1e-06"),
        ({"window_size": (127, 0)}, r"window_size=\(127, 0\); in OPT it is None"),
        ({"spec": ["my.layers", "spec"]}, r"spec=\['my.layers', 'spec'\]"),
        ({"use_mup": argparse.Namespace()}, r"use_mup=\(Namespace\)"),
        ({"num_attention_heads": 2}, "num_attention_heads=2; for the config's .* and 4 heads it is 4"),
        ({"kv_channels": 6}, "kv_channels=6"),
        ({"softmax_scale": 1.0}, "softmax_scale=1.0"),
        ({"group_query_attention": True, "num_query_groups": 2}, "num_query_groups=2"),
        ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}, "TP2 x PP1 are here, but args says TP4"),
    ],
)
def test_megatron_arguments_that_are_not_opts_are_refused(tmp_path, change, message):
    write_megatron_lm(tmp_path, PRE, TENSORS, 2, 1)
    rewrite_arguments(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, OPT_CONFIG)


def test_megatron_core_knows_the_arguments_that_are_checked():
    """Those that are fields of its config and change the function have OPT's value as the default, or are set."""
    from megatron.core.transformer import TransformerConfig

    from opt_megatron.checkpoint.formats.megatron_args import _OPTS_VALUES

    set_for_opt = {"activation_func"}
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    both = (_OPTS_VALUES.keys() & defaults.keys()) - set_for_opt
    assert len(both) > 10 and all(defaults[name] in _OPTS_VALUES[name] for name in both)


def test_the_activation_is_said_to_be_assumed(tmp_path):
    write_megatron_lm(tmp_path, PRE, TENSORS, 1, 1)
    assert ACTIVATION_IS_ASSUMED in open_checkpoint(tmp_path).config_notes
    assert ACTIVATION_IS_ASSUMED not in open_checkpoint(tmp_path, OPT_CONFIG).config_notes
    rewrite_arguments(tmp_path, bias_gelu_fusion=True)
    assert any("bias_gelu_fusion=True" in note for note in open_checkpoint(tmp_path).config_notes)


def test_megatron_lm_config_is_inferred_from_args_and_shapes(tmp_path):
    config = hf_config(vocab_size=32)  # needs no padding at TP2
    tensors = random_tensors(config)
    write_megatron_lm(tmp_path, config, tensors, 2, 1)
    checkpoint = assert_holds(tmp_path, tensors)
    assert checkpoint.config == OPTConfig.from_hf(config)
    assert "4 attention heads from args" in " ".join(checkpoint.config_notes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "release" / "mp_rank_00"), "1 rank files are there, missing are mp_rank_00"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("soon"), "neither 'release' nor a number"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"), "no directory iter_0000007"),
        (lambda d: (d / "release" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"PK"), "truncated"),
        (lambda d: shutil.copytree(d / "release" / "mp_rank_00", d / "release" / "mp_rank_000"), "are the same rank"),
        (lambda d: edit_config(d, num_hidden_layers=5), "the stages hold 4 layers, the config says 5"),
        (lambda d: edit_config(d, ffn_dim=512), "misshapen"),
    ],
)
def test_damaged_megatron_directory(tmp_path, damage, message):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), fsync=False)
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
