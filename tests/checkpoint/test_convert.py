"""Conversion to Megatron's layout and back through its reader: no bit is lost, nothing is left half done."""

import json
import shutil

import pytest
import torch
from factory import random_model, save
from safetensors.torch import load_file

from opt_megatron.checkpoint import convert as convert_module
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats import open_checkpoint
from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.errors import CheckpointError, UserError


def contents(directory) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (6, 1), (1, 3), (3, 4), (2, 12)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_every_layout_keeps_every_bit(models, tmp_path, name, tp, pp):
    source = models[name][0]
    convert(source, tmp_path / "converted", tp, pp)
    assert_same(contents(source), contents(tmp_path / "converted"))


def test_from_one_layout_to_another(models, tmp_path):
    source = models["pre-norm"][0]
    convert(source, tmp_path / "a", 4, 1)
    convert(tmp_path / "a", tmp_path / "b", 2, 3)
    assert_same(contents(source), contents(tmp_path / "b"))


def test_files_are_megatron_lms(models, tmp_path):
    convert(models["story"][0], tmp_path / "c", 2, 2)
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
    for name in ("config.json", "vocab.json", "merges.txt"):
        assert (target / name).is_file()


def test_megatron_qkv_is_rebuilt_from_the_source_by_hand(models, tmp_path):
    source = models["story"][0]
    convert(source, tmp_path / "c", 2, 1)
    stored = load_file(source / "model.safetensors")
    layer = "model.decoder.layers.2.self_attn."
    heads = [stored[f"{layer}{name}_proj.weight"].view(8, 32, 256) for name in "qkv"]
    expected = torch.cat([heads[part][head] for head in range(4, 8) for part in range(3)])
    file = torch.load(tmp_path / "c" / "release" / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert torch.equal(file["model"]["decoder.layers.2.self_attention.linear_qkv.weight"], expected)


def test_converted_model_gives_the_same_logits(models, tmp_path, alone):
    source, oracle = models["story"]
    convert(source, tmp_path / "c", 4, 2)
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "c", None, alone)(tokens), oracle(tokens).logits)


def test_dtype_casts_and_is_recorded(tmp_path):
    source = save(random_model(num_hidden_layers=1), tmp_path / "source")
    convert(source, tmp_path / "half", 2, 1, dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {name: tensor.bfloat16() for name, tensor in contents(source).items()}
    assert_same(contents(tmp_path / "half"), expected)


def test_nothing_is_overwritten_without_force(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", 1, 1)
    with pytest.raises(UserError, match="--force replaces it"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", 2, 1)
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", 2, 1, force=True)
    assert len(list((tmp_path / "c" / "release").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # the former one is gone, no temporary is left


def test_force_never_removes_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="left alone"):
        convert(EMBEDDED_DIRECTORY, tmp_path, 1, 1, force=True)
    assert (tmp_path / "thesis.txt").exists()
    copy = tmp_path / "copy"
    shutil.copytree(EMBEDDED_DIRECTORY, copy)
    for target in (copy, tmp_path):
        with pytest.raises(UserError, match="is the source or holds it"):
            convert(copy, target, 1, 1, force=True)


def test_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "write_rank", full_disk)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", 1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "release" / "mp_rank_00"), "1 rank files are there, missing are mp_rank_00"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("soon"), "neither 'release' nor a number"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"), "no directory iter_0000007"),
        (lambda d: (d / "release" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"PK"), "truncated"),
        (lambda d: (d / "config.json").unlink(), "there is no config.json"),
        (lambda d: edit_config(d, num_hidden_layers=5), "the stages hold 4 layers, the config says 5"),
        (lambda d: edit_config(d, ffn_dim=512), "misshapen"),
    ],
)
def test_damaged_megatron_directory(tmp_path, damage, message):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", 2, 1)
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
