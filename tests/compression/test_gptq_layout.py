"""GPTQ's layout: packed as the reference packs, written, read at any layout, and run in 4 bits as it is stored."""

import json

import compression_jobs
import pytest
import torch
from safetensors.torch import load_file, save_file

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.load import read_parameter
from opt_megatron.checkpoint.load_numbers import holds_numbers, read_numbers
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.parameter_mapping import even_stage_parameters
from opt_megatron.checkpoint.storage.packed_bits import pack_bits, unpack_bits
from opt_megatron.errors import CheckpointError
from opt_megatron.model.linear_methods.int4_weight_only import Int4WeightOnlyLinear

FC2 = "model.decoder.layers.1.fc2"


def packed_by_autogptq(codes: torch.Tensor, bits: int) -> list[int]:
    """The words of one column by the loops of AutoGPTQ's qlinear_cuda_old.py (`pack`), unsigned."""
    values, words = codes.tolist(), [0] * (len(codes) * bits // 32)
    i = row = 0
    while row < len(words):
        if bits in (2, 4, 8):
            for j in range(i, i + 32 // bits):
                words[row] |= values[j] << (bits * (j - i))
            i, row = i + 32 // bits, row + 1
            continue
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i))
        i += 10
        words[row] |= values[i] << 30 & 0xFFFFFFFF
        row += 1
        words[row] |= (values[i] >> 2) & 1
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 1)
        i += 10
        words[row] |= values[i] << 31 & 0xFFFFFFFF
        row += 1
        words[row] |= (values[i] >> 1) & 3
        i += 1
        for j in range(i, i + 10):
            words[row] |= values[j] << (3 * (j - i) + 2)
        i, row = i + 10, row + 1
    return words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing(bits):
    codes = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert (words.long() & 0xFFFFFFFF).t().tolist() == [packed_by_autogptq(column, bits) for column in codes.t()]
    assert torch.equal(unpack_bits(words, bits), codes)


@pytest.fixture(scope="module")
def stored(ranks, tmp_path_factory):
    """The embedded model in 4 bits: in GPTQ's layout, written at TP 2 x PP 2, and as floats."""
    directory = tmp_path_factory.mktemp("gptq")
    recipe = [{"quantize": {"method": "rtn", "bits": 4, "group_size": 128}}]
    job, options = compression_jobs.compressed, {"dtype": "float32"}
    ranks(4).run(job, EMBEDDED_DIRECTORY, 2, 2, directory / "packed", recipe, "none", options | {"to": "gptq"})
    ranks(1).run(job, EMBEDDED_DIRECTORY, 1, 1, directory / "floats", recipe, "none", options)
    return directory


def test_values_and_parts(stored):
    packed, floats = open_checkpoint(stored / "packed"), load_file(stored / "floats" / "model.safetensors")
    assert packed.format_description == "GPTQ, 4 bits"
    for name, expected in floats.items():
        values = packed.read(name)
        assert (values - expected).abs().max() <= 1e-3 * expected.abs().max()  # scales have 16 bits
    part = packed.read(f"{FC2}.weight", (slice(3, 77), slice(130, 500)))
    assert torch.equal(part, packed.read(f"{FC2}.weight")[3:77, 130:500])
    content = load_file(stored / "packed" / "model.safetensors")
    assert content[f"{FC2}.qweight"].shape == (1024 // 8, 256) and content[f"{FC2}.qzeros"].shape == (8, 256 // 8)
    assert content[f"{FC2}.g_idx"].tolist() == [column // 128 for column in range(1024)]


@pytest.mark.parametrize("ranks_of_layer", [1, 2, 4])
def test_numbers_of_a_rank_are_its_weights(stored, ranks_of_layer):
    """Fused q, k and v, rows and columns: the same values as floats that are read and divided."""
    checkpoint = open_checkpoint(stored / "packed")
    method = Int4WeightOnlyLinear.with_group_size(64)
    for parameter in even_stage_parameters(checkpoint.config, 1, 0):
        if not parameter.megatron.endswith(".weight") or "layers.2" not in parameter.megatron:
            continue
        assert holds_numbers(checkpoint, parameter, method) == ("norm" not in parameter.megatron)
        if "norm" in parameter.megatron:
            continue
        for rank in range(ranks_of_layer):
            shape = list(checkpoint.tensors[parameter.canonical[0]].shape)
            shape[0] *= len(parameter.canonical)
            shape[parameter.split.value] //= ranks_of_layer
            target = torch.empty(shape)
            read_parameter(target, checkpoint, parameter, rank, ranks_of_layer)
            numbers = read_numbers(target, checkpoint, parameter, rank, ranks_of_layer, 64, target.device)
            identity = torch.eye(shape[1])
            assert torch.equal(method.of_numbers(numbers)(identity, None).t(), target)


def test_layouts_run_the_stored_numbers(stored, ranks):
    tokens = torch.arange(4, 44)[None]
    exact, alone, floats = (
        ranks(1).run(compression_jobs.logits, directory, 1, quantization, tokens)[0]
        for directory, quantization in (
            (stored / "packed", None),
            (stored / "packed", "int4"),
            (EMBEDDED_DIRECTORY, "int4"),
        )
    )
    for logits in ranks(2).run(compression_jobs.logits, stored / "packed", 2, "int4", tokens):
        assert (logits - alone).norm() < 0.2 * (alone - exact).norm() < 0.2 * (floats - exact).norm()


def test_other_groups_are_refused(ranks, tmp_path):
    recipe = [{"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}]
    job, target = compression_jobs.compressed, tmp_path / "packed"
    ranks(1).run(job, EMBEDDED_DIRECTORY, 1, 1, target, recipe, "none", {"to": "gptq"})
    message = ranks(1).run(compression_jobs.load_error, target, "int4")[0]
    assert "its 4-bit weights have groups of 32 inputs, which groups of 128 do not divide" in message
    assert ranks(1).run(compression_jobs.load_error, target, "int4-g32") == ["nothing was raised"]


def test_interrupted_runs_are_equal(ranks, tmp_path):
    """Of integers, too: what an interrupted run has stored is what it was calibrated on."""
    generator = torch.Generator().manual_seed(0)
    windows, recipe = tmp_path / "windows.jsonl", [{"quantize": {"bits": 3, "act_order": True}}]
    windows.write_text(json.dumps({"tokens": torch.randint(4, 500, (40,), generator=generator).tolist()}) + "\n")
    options = {"to": "gptq", "dtype": "float32"}
    job, stopped = compression_jobs.compressed, compression_jobs.interrupted
    ranks(1).run(job, EMBEDDED_DIRECTORY, 1, 1, tmp_path / "whole", recipe, windows, options)
    ranks(1).run(stopped, EMBEDDED_DIRECTORY, 1, 1, tmp_path / "resumed", recipe, windows, 2, options)
    ranks(2).run(job, EMBEDDED_DIRECTORY, 2, 1, tmp_path / "resumed", recipe, windows, options | {"resume": True})
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_sizes_that_cannot_be_packed(four_layers, ranks, tmp_path):
    recipe = [{"quantize": {"method": "rtn"}}]
    message = ranks(1).run(
        compression_jobs.message_of, four_layers, 1, 1, tmp_path / "a", recipe, "none", {"to": "gptq"}
    )[0]
    assert message.startswith("--to gptq: the model's hidden_size of 48 does not divide by 32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{FC2}.g_idx": torch.full((1024,), 8, dtype=torch.int32)}, "an input is of group 8, and there are 8"),
        ({f"{FC2}.qzeros": torch.zeros(8, 31, dtype=torch.int32)}, "do not belong together"),
        ({f"{FC2}.scales": None}, f"{FC2} has no scales"),
    ],
)
def test_damaged_files_are_refused(stored, tmp_path, change, message):
    for file in (stored / "packed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = load_file(tmp_path / "model.safetensors") | change
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    assert message in str(raised.value)
