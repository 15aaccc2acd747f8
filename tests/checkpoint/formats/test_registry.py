"""Every format gives the same canonical tensors and config, or says what is wrong with the set of files."""

import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from checkpoint_samples import OPT_CONFIG, PRE, SAMPLES, TENSORS, assert_holds, rewrite
from formats import hf_config, load, save, write_hf, write_metaseq_parts
from safetensors.torch import save_file

from opt_megatron.checkpoint.formats.format import OutputFormat
from opt_megatron.checkpoint.formats.registry import all_formats, open_checkpoint, output_format, output_format_names
from opt_megatron.checkpoint.parameter_mapping import canonical_shapes
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_holds_the_same_tensors(tmp_path, name):
    directory = SAMPLES[name](tmp_path / name)
    config = None
    if name.startswith("megatron-lm"):  # a vocabulary of 24 is padded to 32; nothing but a config can tell
        config = OPTConfig.from_hf(PRE)
    checkpoint = assert_holds(directory, TENSORS, config)
    assert checkpoint.config == OPTConfig.from_hf(PRE)
    assert bool(checkpoint.config_notes) == (not (directory / "config.json").exists() and config is None)


def test_config_overrides_what_is_inferred(tmp_path):
    write_metaseq_parts(tmp_path, PRE, TENSORS, 2)
    other = OPTConfig.from_hf(hf_config(num_attention_heads=2))
    assert open_checkpoint(tmp_path, other).config.num_attention_heads == 2


def unlink(*names):
    return lambda d: [(d / name).unlink() for name in names]


DAMAGES = [
    ("parts", unlink("reshard-model_part-0.pt"), "1 files make up to 2 parts x 1 shards, but 1 are missing: part 0"),
    ("parts", unlink("reshard-model_part-1.pt"), "1 of 2 parts are here: they hold 6 of the 12 columns"),
    ("fsdp", unlink("checkpoint_last-model_part-1-shard1.pt"), "missing: part 1 shard 1"),
    ("fsdp", unlink(*[f"checkpoint_last-model_part-{p}-shard2.pt" for p in (0, 1)]), "shards are missing"),
    (
        "parts",
        lambda d: shutil.copy(d / "reshard-model_part-1.pt", d / "reshard-model_part-01.pt"),
        "are the same part",
    ),
    ("parts", lambda d: shutil.copy(d / "reshard-model_part-1.pt", d / "restored.pt"), "files of 2 checkpoints"),
    ("flagai-4", unlink("pytorch_model_02.bin"), "3 parts are here, 1 are missing: pytorch_model_02"),
    ("flagai-4", unlink("pytorch_model_03.bin"), "hold 18 of 24 vocabulary rows: parts are missing"),
    ("flagai", lambda d: shutil.copy(d / "pytorch_model_01.bin", d / "pytorch_model_1.bin"), "are the same part"),
    ("singleton", lambda d: torch.save([1, 2], d / "restored.pt"), "has no 'model' dictionary"),
    ("singleton", lambda d: torch.save({"model": {"weight": torch.ones(2)}}, d / "restored.pt"), "give --config"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_incomplete_and_mixed_sets_are_refused_with_what_is_there(tmp_path, name, damage, message):
    directory = SAMPLES[name](tmp_path / "set")
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_a_config_that_git_lfs_has_not_fetched(tmp_path):
    directory = SAMPLES["hf"](tmp_path / "hf")
    (directory / "config.json").write_text(POINTER)
    with pytest.raises(
        CheckpointError, match=r"config\.json: cannot be read: is a git-lfs pointer, not the file itself"
    ):
        open_checkpoint(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 250540281\n"
WEIGHT_FILES = {
    "hf": "model.safetensors",
    "flagai-single": "pytorch_model.bin",
    "singleton": "restored.pt",
    "megatron-lm": "iter_0001000/mp_rank_00/model_optim_rng.pt",
}


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_files_that_are_no_weights_are_called_what_they_are(tmp_path, monkeypatch, name):
    file = SAMPLES[name](tmp_path / "c") / WEIGHT_FILES[name]

    def message() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / "c", OPT_CONFIG)
        return str(caught.value)

    content = file.read_bytes()
    file.write_text(POINTER)
    assert f"{file.name}: is a git-lfs pointer, not the file itself: run `git lfs pull`" in message()
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    assert name == "hf" or re.search(r"format from before 1\.6.*torch\.save\(torch\.load", message())
    file.write_bytes(content[: len(content) // 2])
    assert re.search("truncated|damaged or incomplete", message())
    monkeypatch.setattr(
        "opt_megatron.checkpoint.storage.tensor_file.open_regular",
        mock.Mock(side_effect=PermissionError(13, "Permission denied")),
    )
    assert message().endswith("cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["hf", "flagai", "singleton", "megatron-lm-2x2"])
def test_the_prefix_of_distributed_data_parallel_is_taken_off(tmp_path, name):
    directory = SAMPLES[name](tmp_path)
    if name == "hf":
        save_file({f"module.{key}": value for key, value in TENSORS.items()}, directory / "model.safetensors")
    for file in [*directory.rglob("*.pt"), *directory.glob("*.bin")]:
        content = load(file)
        key = "module" if name == "flagai" else "model"
        save(content | {key: {f"module.{k}": v for k, v in content[key].items()}}, file)
    assert_holds(directory, TENSORS, OPT_CONFIG)


COPIES = [
    ("parts", "reshard-model_part-{}.pt", "parts 0 and 1 hold the same slice"),
    ("flagai", "pytorch_model_0{}.bin", "parts 0 and 1 hold the same slice"),
    ("megatron-lm-2x2", "iter_0001000/mp_rank_0{}_000/model_optim_rng.pt", "ranks 0 and 1 hold the same slice"),
    ("megatron-lm-2x2", "iter_0001000/mp_rank_00_00{}/model_optim_rng.pt", "missing|hold the same slice"),
]


@pytest.mark.parametrize(("name", "file", "message"), COPIES)
def test_a_part_that_was_copied_over_another_is_found(tmp_path, name, file, message):
    directory = SAMPLES[name](tmp_path / "set")
    shutil.copy(directory / file.format(0), directory / file.format(1))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory, OPT_CONFIG)


def test_stored_copies_of_the_embedding_are_compared(tmp_path):
    """metaseq's output projection, FlagAI's whole head, and the last Megatron stage's head."""
    embedding = "model.decoder.embed_tokens.weight"
    SAMPLES["parts"](tmp_path / "m")
    rewrite(tmp_path / "m" / "reshard-model_part-1.pt", decoder__output_projection__weight=torch.ones(12, 12).half())
    SAMPLES["flagai"](tmp_path / "f")
    content = torch.load(tmp_path / "f" / "pytorch_model_01.bin")
    content["module"]["lm_head.weight"] = torch.ones(24, 12).half()
    torch.save(content, tmp_path / "f" / "pytorch_model_01.bin")
    SAMPLES["megatron-lm-2x2"](tmp_path / "l")
    rewrite(
        tmp_path / "l/iter_0001000/mp_rank_01_001/model_optim_rng.pt", output_layer__weight=torch.ones(16, 12).half()
    )
    for place in "mfl":
        with pytest.raises(CheckpointError, match=r"OPT ties the two|not the same in parts"):
            open_checkpoint(tmp_path / place, OPT_CONFIG).read(embedding)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__0__self_attn__qkv_proj__weight": torch.tensor(1.0)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__²__fc1__weight": torch.ones(2)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__99999999__fc1__weight": torch.ones(2)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__0__fc1__bias": torch.ones(20).double()}),
        lambda d: (d / "restored.pt").rename(d / "reshard-model_part-30000000.pt"),
    ],
)
@pytest.mark.timeout(30)
def test_hostile_names_and_shapes_are_one_line(tmp_path, damage):
    SAMPLES["singleton"](tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("text", ['{"model_type": "opt", "num_hidden_layers": 1000000000}', "[" * 100_000])
def test_hostile_configs_are_one_line(tmp_path, text):
    write_hf(tmp_path, PRE, TENSORS)
    values = json.loads(text) if text[0] == "{" else None
    (tmp_path / "config.json").write_text(json.dumps(PRE | values) if values else text)
    with pytest.raises(CheckpointError, match=r"more than the 10000|cannot be read as JSON"):
        open_checkpoint(tmp_path)


def test_tensors_that_share_their_storage_are_not_taken_for_a_model(tmp_path):
    """A small file may declare a large model: every layer is the same numbers."""
    config = PRE | {"num_hidden_layers": 300, "hidden_size": 96, "ffn_dim": 200, "word_embed_proj_dim": 96}
    numbers = torch.ones(96 * 200)
    shapes = canonical_shapes(OPTConfig.from_hf(config))
    state = {name: numbers[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its tensors take 91,607,424 bytes and its files hold \d{3},\d{3}:"):
        open_checkpoint(tmp_path)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "reshard.pt", "pytorch_model_00.bin"])
def test_special_files_are_named_and_not_waited_for(tmp_path, name):
    write_hf(tmp_path, PRE, TENSORS)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"{name}: is a named pipe .*not a regular file"):
            open_checkpoint(path)


def test_unknown_keys_are_never_dropped_in_silence(tmp_path):
    SAMPLES["singleton"](tmp_path)
    rewrite(tmp_path / "restored.pt", decoder__surprise__weight=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"1 unknown: model\.decoder\.surprise\.weight"):
        open_checkpoint(tmp_path)


def test_directories_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        open_checkpoint(tmp_path)


def test_flagais_parts_go_before_a_hugging_face_file_in_the_same_directory(tmp_path):
    SAMPLES["flagai"](tmp_path)
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format_description == "FlagAI parts, 2"


def test_formats_are_asked_in_one_order_and_written_ones_are_listed():
    ranks = [known.detection_rank for known in all_formats()]
    assert ranks == sorted(set(ranks))
    written = {output_format(name) for name in output_format_names()}
    assert written == {known for known in all_formats() if isinstance(known, OutputFormat)}


def test_names_are_listed_without_torch():
    code = "import sys; import opt_megatron.checkpoint.conversion_options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
