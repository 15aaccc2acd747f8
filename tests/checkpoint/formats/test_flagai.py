"""FlagAI's format: parts are read, joined and written, and broken ones are refused."""

import pytest
import torch
from checkpoint_samples import PRE, SAMPLES, TENSORS
from formats import cut, load, save, write_hf

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.errors import CheckpointError


def test_biases_that_flagais_converter_cut_wrongly_are_refused(tmp_path):
    SAMPLES["flagai"](tmp_path)
    for part in range(2):
        path = tmp_path / f"pytorch_model_{part:02d}.bin"
        content = load(path)
        name = "model.decoder.layers.0.fc1.bias"
        content["module"][name] = TENSORS[name].clone()  # whole where it should be cut
        save(content, path)
    with pytest.raises(CheckpointError, match=r"1 biases have wrong shapes.*FlagAI's converter"):
        open_checkpoint(tmp_path)


def flagai_weights(path):
    """The attention inputs that FlagAI's OPTModel.load_weights makes of a file, which depend on the order in it."""
    checkpoint = torch.load(path)
    checkpoint = checkpoint.get("module", checkpoint)
    found, latest = {}, {}
    for name, tensor in checkpoint.items():
        module, _, kind = name.removeprefix("model.decoder.layers.").rpartition(".")
        layer, _, projection = module.partition(".self_attn.")
        if projection in ("k_proj", "v_proj", "q_proj"):
            latest[projection, kind] = tensor
        if projection == "q_proj":
            found[int(layer), kind] = torch.cat([latest[f"{letter}_proj", kind] for letter in "qkv"])
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_flagai_joins_q_k_and_v_of_one_layer(tmp_path, parts):
    write_hf(tmp_path / "hf", PRE, TENSORS)
    convert(tmp_path / "hf", tmp_path / "f", ConversionOptions("flagai", parts), fsync=False)
    for part, path in enumerate(sorted((tmp_path / "f").glob("*.bin"))):
        for (layer, kind), fused in flagai_weights(path).items():
            names = [f"model.decoder.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            assert torch.equal(fused, torch.cat([cut(name, TENSORS[name], part, parts) for name in names]))
