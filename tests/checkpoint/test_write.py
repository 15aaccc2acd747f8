"""Writing: in blocks of rows, with casts that are checked."""

import pytest
import torch
from checkpoint_samples import assert_same, contents, megatron
from formats import hf_config, random_tensors, write_hf, write_metaseq_flat

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.manifest import read_manifest
from opt_megatron.errors import UserError


def test_blocks_of_rows_do_not_change_the_result(tmp_path, monkeypatch):
    """Tensors larger than a block are copied in pieces; here a block is a row or two."""
    from opt_megatron.checkpoint import write

    config = hf_config()
    tensors = random_tensors(config)
    write_metaseq_flat(tmp_path / "source", config, tensors, 2, 3)
    convert(tmp_path / "source", tmp_path / "large", megatron(2, 2), fsync=False)
    monkeypatch.setattr(write, "BLOCK_BYTES", 50)
    convert(tmp_path / "source", tmp_path / "small", megatron(2, 2), fsync=False)
    assert_same(tensors, contents(tmp_path / "small"))
    assert read_manifest(tmp_path / "small") == read_manifest(tmp_path / "large")


def test_a_cast_that_would_overflow_names_the_tensor(tmp_path):
    config = hf_config()
    tensors = random_tensors(config, dtype=torch.float32)
    tensors["model.decoder.layers.0.fc1.bias"][2] = 1e6
    write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(UserError, match=r"layers\.0\.fc1\.bias holds 1e\+06, and float16 ends at 65504"):
        convert(tmp_path / "source", tmp_path / "c", ConversionOptions("hf", dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(tmp_path / "source", tmp_path / "c", ConversionOptions("hf", dtype="bfloat16"), fsync=False)


def test_values_that_are_no_numbers_survive(tmp_path):
    config = hf_config()
    tensors = random_tensors(config)
    tensors["model.decoder.layers.0.fc2.bias"][1] = float("nan")
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "m", ConversionOptions("metaseq", 2), fsync=False)
    read = contents(tmp_path / "m")["model.decoder.layers.0.fc2.bias"]
    assert torch.equal(read.view(torch.int16), tensors["model.decoder.layers.0.fc2.bias"].view(torch.int16))
