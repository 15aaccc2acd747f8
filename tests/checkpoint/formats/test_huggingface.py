"""Hugging Face's directories: every variant of names and files is read the same, and transformers loads the export."""

import json

import pytest
import torch
from checkpoint_samples import PRE, TENSORS, assert_holds, megatron
from formats import random_tensors, write_hf
from safetensors.torch import save_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.parameter_mapping import canonical_shapes
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


CONFIG = OPTConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=16,
    word_embed_proj_dim=8,
    vocab_size=12,
    max_position_embeddings=6,
)


def canonical() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in canonical_shapes(CONFIG).items()}


def write(directory, tensors, *, kind="safetensors", shards=1):
    """Write tensors as transformers would, without asking it to."""
    (directory / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    save = (lambda part, path: save_file(part, path)) if kind == "safetensors" else torch.save
    if shards == 1:
        save(tensors, directory / f"{stem}.{ending}")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: tensor for n, (name, tensor) in enumerate(tensors.items()) if n % shards == shard}
        save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check_equal(directory):
    checkpoint = open_checkpoint(directory)
    expected = canonical()
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_prefixes_kinds_and_shards(tmp_path, prefix, kind, shards):
    renamed = {prefix + name.removeprefix("model.decoder."): tensor for name, tensor in canonical().items()}
    write(tmp_path, renamed, kind=kind, shards=shards)
    check_equal(tmp_path)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_tensor_under_either_name_or_both(tmp_path, stored):
    tensors = canonical()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if stored != "both":
        del tensors[HEAD if stored == "embedding" else EMBEDDING]
    write(tmp_path, tensors)
    check_equal(tmp_path)


def test_head_that_differs_from_the_embedding_is_refused(tmp_path):
    write(tmp_path, canonical() | {HEAD: torch.zeros(12, 8)})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"OPT ties the two"):
        checkpoint.read(EMBEDDING)


def test_a_block_reads_only_its_bytes(tmp_path):
    write(tmp_path, canonical())
    checkpoint = open_checkpoint(tmp_path)
    block = checkpoint.read("model.decoder.layers.1.fc2.weight", (slice(0, 8), slice(4, 8)))
    assert torch.equal(block, canonical()["model.decoder.layers.1.fc2.weight"][:, 4:8])
    assert checkpoint.bytes_read == 8 * 4 * 4


def drop(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: drop(t, "model.decoder.layers.1.fc1.bias"), r"1 missing: model\.decoder\.layers\.1\.fc1\.bias"),
        (lambda t: t.update({"model.decoder.extra": torch.zeros(1)}), r"1 unknown: model\.decoder\.extra"),
        (
            lambda t: t.update({"model.decoder.embed_positions.weight": torch.zeros(6, 8)}),
            r"embed_positions\.weight is \[6, 8\], the config says \[8, 8\]",
        ),
        (
            lambda t: t.update({"model.decoder.final_layer_norm.bias": torch.zeros(8, dtype=torch.int32)}),
            "is stored as I32",
        ),
    ],
)
def test_wrong_tensors_are_listed_by_name(tmp_path, damage, message):
    tensors = canonical()
    damage(tensors)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 7, 300, -100])
def test_truncated_file(tmp_path, kind, kept):
    write(tmp_path, canonical(), kind=kind)
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"damaged or incomplete|truncated"):
        open_checkpoint(tmp_path)


def test_missing_shard_is_named(tmp_path):
    write(tmp_path, canonical(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of the 3 shards.*model-00002-of-00003"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_cannot_name_files_elsewhere(tmp_path, name):
    write(tmp_path, canonical(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(tmp_path)


def test_bin_that_would_run_code_runs_none(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write(tmp_path, canonical() | {"x": Hostile()}, kind="bin")
    check_equal(tmp_path)  # what is not a tensor is passed over
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_named_is_the_one_that_is_read(tmp_path, name):
    other = random_tensors(PRE, seed=4)
    write_hf(tmp_path, PRE, TENSORS)
    torch.save(other, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path / name, TENSORS if name.endswith("safetensors") else other)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    write_hf(tmp_path, PRE, TENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert_holds(tmp_path, TENSORS)


def test_hugging_face_without_config_takes_heads_from_the_table_or_asks(tmp_path):
    write_hf(tmp_path, PRE, TENSORS)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="--config"):
        open_checkpoint(tmp_path)
    (tmp_path / "elsewhere.json").write_text(json.dumps(PRE))
    assert_holds(tmp_path, TENSORS, OPTConfig.from_file(tmp_path / "elsewhere.json"))


@pytest.mark.parametrize("options", [ConversionOptions(to="hf"), ConversionOptions(to="hf", max_shard_size=2_000_000)])
def test_transformers_loads_the_export_without_a_warning(tmp_path, models, options, caplog, recwarn):
    from transformers import OPTForCausalLM

    convert(EMBEDDED_DIRECTORY, tmp_path / "m", megatron(2, 2), fsync=False)
    convert(tmp_path / "m", tmp_path / "hf", options, fsync=False)
    caplog.clear()
    loaded, report = OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [record.message for record in caplog.records] == []
    assert not [w for w in recwarn.list if "opt" in str(w.message).lower()]
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, models["story"][1](tokens).logits)
