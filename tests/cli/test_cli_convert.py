"""opt-megatron convert as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
from formats import hf_config, random_tensors, write_megatron_lm, write_metaseq_flat

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_tool_writes_what_its_last_line_says(tmp_path):
    target = tmp_path / "tp2"
    sizes = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    command = [sys.executable, str(TOOL), "--load", "story", "--save", str(target), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert done.stderr.startswith("opt-megatron: for Megatron-LM: position ids begin at 2")
    expected = f"wrote {target}: Megatron TP2 x PP2 from Hugging Face safetensors, 4 files, 11.1 MB in "
    assert done.stdout.startswith(expected)
    assert (target / "release" / "mp_rank_01_001" / "model_optim_rng.pt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "story"], "--save"),
        (["--load", "story", "--save", "{}/new", "--tensor-model-parallel-size", "3"], "8 attention heads"),
        (["--load", "story", "--save", "{}/new", "--pipeline-model-parallel-size", "3"], "4 layers"),
        (["--load", "story", "--save", "{}/new", "--dtype", "int8"], "'int8' is not one of"),
        (["--load", "story", "--save", "{}/new", "--to", "gguf"], "--to gguf is not one of megatron, hf"),
        (["--load", "story", "--save", "{}/new", "--to", "hf", "--max-shard-size", "5 apples"], "is not a size"),
        (["--load", "story", "--save", "{}/new", "--to", "hf", "--tensor-model-parallel-size", "2"], "whole tensors"),
        (["--load", "story", "--save", "{}/new", "--workers", "0"], "--workers is 0"),
        (["--load", "story", "--save", "{}/new", "--config", "/nowhere"], "there is no config.json"),
        (["--load", "/nowhere", "--save", "{}/new"], "there is no such directory"),
        (["--load", "story", "--save", str(EMBEDDED_DIRECTORY), "--force"], "is the source"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, *[argument.format(tmp_path) for argument in arguments])
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith("opt-megatron: error: ") and message in err and len(err.splitlines()) == 1


def test_what_was_derived_is_reported(capsys, tmp_path):
    config = hf_config()
    write_metaseq_flat(tmp_path / "source", config, random_tensors(config), 2, 3)
    code, out, err = run(capsys, "--load", str(tmp_path / "source"), "--save", str(tmp_path / "hf"), "--to", "hf")
    assert code == 0 and "from metaseq FSDP shards, 2 parts x 3 shards" in out
    assert "no config.json: 4 attention heads from cfg.model" in err


def test_an_activation_that_is_stated_is_not_called_assumed(capsys, tmp_path):
    config = hf_config(vocab_size=32)
    write_megatron_lm(tmp_path / "source", config, random_tensors(config), 2, 1)
    command = ["--load", str(tmp_path / "source"), "--force", "--save", str(tmp_path / "hf"), "--to", "hf"]
    code, _, err = run(capsys, *command)
    assert code == 0 and "the activation is assumed to be ReLU" in err
    code, _, err = run(capsys, *command, "--activation", "relu")
    assert code == 0 and "4 attention heads from args" in err and "ReLU" not in err
    assert run(capsys, *command, "--activation", "gelu")[0] == 2
