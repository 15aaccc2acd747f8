"""opt-megatron inspect, verify and plan as a user calls them."""

import json

import pytest
import torch
from formats import hf_config, random_tensors, write_hf, write_metaseq_flat
from safetensors.torch import load_file, save_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def pair(tmp_path):
    """A model as Hugging Face's files and as metaseq's shards."""
    config = hf_config()
    tensors = random_tensors(config)
    return write_hf(tmp_path / "hf", config, tensors), write_metaseq_flat(tmp_path / "fsdp", config, tensors, 2, 3)


def test_inspect_tells_what_a_checkpoint_is(capsys, pair):
    code, out, err = run(capsys, "inspect", str(pair[1]))
    facts = {line[:12].strip(): line[12:] for line in out.splitlines()}
    assert code == 0
    assert facts["format"] == "metaseq FSDP shards, 2 parts x 3 shards"
    assert facts["hidden"] == "12, 4 heads, ffn 20"
    assert facts["dtype"] == "float16 (36 tensors)"
    assert facts["parameters"].startswith("2,800 in 36 tensors") and facts["manifest"] == "no"
    assert "1: " in facts["at TP"] and "4: " in facts["at TP"] and "3: " not in facts["at TP"]
    assert "no config.json" in err


def test_inspect_tells_what_each_rank_of_a_megatron_directory_holds(capsys, tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "m", ConversionOptions("megatron", 2, 2), fsync=False)
    _, out, _ = run(capsys, "inspect", str(tmp_path / "m"))
    assert "mp_rank_01_001  layers 2-3, 2.6 MB" in out and "manifest    yes" in out


def test_verify_tells_bits_from_values_and_looks_at_the_config(capsys, tmp_path):
    config = hf_config()
    tensors = random_tensors(config)
    name = "model.decoder.final_layer_norm.bias"
    for place, value in (("plus", 0.0), ("minus", -0.0), ("nan", float("nan")), ("wide", float("inf"))):
        write_hf(tmp_path / place, config, tensors | {name: torch.full_like(tensors[name], value)})
    code, out, _ = run(capsys, "verify", str(tmp_path / "plus"), str(tmp_path / "minus"))
    assert code == 1 and f"{name} differs in 12 of 12 values, by at most 0" in out
    assert run(capsys, "verify", str(tmp_path / "nan"), str(tmp_path / "nan"))[0] == 0
    convert(tmp_path / "wide", tmp_path / "float", ConversionOptions("hf", dtype="float32"), fsync=False)
    assert "differs in" not in run(capsys, "verify", str(tmp_path / "wide"), str(tmp_path / "float"))[1]
    path = tmp_path / "float" / "config.json"
    path.write_text(path.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    code, out, _ = run(capsys, "verify", str(tmp_path / "float"))
    assert code == 1 and "config: num_attention_heads is 2 in the first and 4 in the second" in out
    assert "are equal to the bit in all 36 tensors, but differ in 1 value of the config" in out


def test_verify_against_the_manifest_finds_one_flipped_bit(capsys, pair, tmp_path):
    convert(pair[0], tmp_path / "m", ConversionOptions(to="hf"))
    code, out, _ = run(capsys, "verify", str(tmp_path / "m"))
    assert code == 0 and "are equal to the bit in all 36 tensors" in out
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, _ = run(capsys, "verify", str(tmp_path / "m"))
    assert code == 1 and "has other bytes than the manifest says" in out and "differ in 1 of 36" in out


def test_verify_two_formats_names_each_difference(capsys, pair, tmp_path):
    code, out, _ = run(capsys, "verify", *map(str, pair))
    assert code == 0 and "(metaseq FSDP shards, 2 parts x 3 shards) are equal to the bit" in out
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["model.decoder.layers.1.fc1.bias"][3] += 0.5
    tensors["model.decoder.layers.0.fc2.bias"] = tensors["model.decoder.layers.0.fc2.bias"].float()
    save_file(tensors, pair[0] / "model.safetensors")
    code, out, _ = run(capsys, "verify", *map(str, pair))
    assert code == 1
    assert "model.decoder.layers.1.fc1.bias differs in 1 of 20 values, by at most 0.5" in out
    assert "model.decoder.layers.0.fc2.bias is float32 in the first and float16 in the second, with equal values" in out
    assert len(out.splitlines()) == 3


def test_verify_compares_a_forward_pass_as_well(capsys, pair):
    code, out, _ = run(capsys, "verify", *map(str, pair), "--logits")
    assert code == 0 and "logits over 8 tokens are equal" in out
    tensors = load_file(pair[0] / "model.safetensors")
    tensors["model.decoder.final_layer_norm.bias"] += 1
    save_file(tensors, pair[0] / "model.safetensors")
    code, out, _ = run(capsys, "verify", *map(str, pair), "--logits")
    assert code == 1 and "logits over 8 tokens differ by at most" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "story"], "has no opt_megatron_manifest.json"),
        (["verify", "story", "--logits"], "name a second one"),
        (["verify", "story", "--workers", "0"], "--workers is 0"),
        (["plan", "--model", "opt-13b", "--context", "0"], "must be at least 1"),
        (["plan", "--model", "opt-13b", "--device-memory", "9" * 400 + "B"], "more than any machine has"),
        (["verify", "/nowhere", "story"], "no such directory"),
        (["inspect", "/nowhere"], "no such directory"),
        (["plan", "--model", "opt-9b"], "is not a released OPT size"),
        (["plan", "--model", "opt-13b", "--tensor-model-parallel-size", "3"], "does not divide"),
        (["plan", "--model", "opt-13b", "--batch", "0"], "must be at least 1"),
        (["plan", "--model", "opt-13b", "--context", "4096"], "passes the model's 2048 positions"),
        (["plan", "--model", "opt-175b", "--device-memory", "1GB"], "no layout of up to 128 ranks fits"),
        (["plan", "--model", "opt-13b", "--dtype", "int4"], "'int4' is not one of"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_damaged_manifest(capsys, pair, tmp_path):
    convert(pair[0], tmp_path / "m", ConversionOptions(to="hf"))
    (tmp_path / "m" / "opt_megatron_manifest.json").write_text(json.dumps({"tensors": [1]}))
    code, _, err = run(capsys, "verify", str(tmp_path / "m"))
    assert code == 2 and "cannot be read as a manifest" in err


def test_plan_of_175b_on_sixteen_ranks(capsys):
    sizes = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "2"]
    code, out, _ = run(capsys, "plan", "--model", "opt-175b", *sizes, "--batch", "8", "--context", "2048")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 1 + 1 + 16 + 1
    assert lines[2].split()[:5] == ["0", "0", "0-47", "0-11", "0-6283"]
    # 2 * 48 layers * 8 rows * 2048 tokens * 12288 / 8 values * 2 bytes
    assert f"{2 * 48 * 8 * 2048 * 12288 / 8 * 2 / 1e9:.2f} GB" in lines[2]
    assert lines[-1].startswith("fits:")
    _, out, _ = run(capsys, "plan", "--model", "opt-175b", *sizes, "--device-memory", "20GB")
    assert out.splitlines()[-1].startswith("does not fit:")


def test_plan_proposes_the_smallest_layouts(capsys):
    _, out, _ = run(capsys, "plan", "--model", "opt-30b", "--device-memory", "24GB", "--context", "512")
    assert out.splitlines()[2].startswith("  TP1 x PP3  3 ranks, 20.80 GB on the fullest")
    assert all("3 ranks" in line for line in out.splitlines()[2:])
