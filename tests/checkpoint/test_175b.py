"""The 992 shards of OPT-175B, as sparse files with the real metadata: every byte range is found, quickly."""

import argparse
import random

import pytest
import torch

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.storage.torch_reader import TorchFile
from opt_megatron.checkpoint.storage.torch_writer import TensorPlaceholder, create_torch_file
from opt_megatron.config import RELEASED_SIZES

PARTS, SHARDS, LAYERS, H, F, V = 8, 124, 96, 12288, 49152, 50272
# Sizes that the release's own metadata states (checkpoint formats, metaseq's raw shards).
ROOT_SHARD, LAYER_SHARD = 826_071, 1_827_234
ROOT = {"embed_tokens.weight": (V // PARTS, H), "embed_positions.weight": (2050, H)}
ROOT |= {"layer_norm.weight": (H,), "layer_norm.bias": (H,)}
LAYER = {
    "self_attn.qkv_proj.weight": (3 * H // PARTS, H),
    "self_attn.qkv_proj.bias": (3 * H // PARTS,),
    "self_attn.out_proj.weight": (H, H // PARTS),
    "self_attn.out_proj.bias": (H,),
    "self_attn_layer_norm.weight": (H,),
    "self_attn_layer_norm.bias": (H,),
    "fc1.weight": (F // PARTS, H),
    "fc1.bias": (F // PARTS,),
    "fc2.weight": (H, F // PARTS),
    "fc2.bias": (H,),
    "final_layer_norm.weight": (H,),
    "final_layer_norm.bias": (H,),
}


def numel(shape):
    return torch.Size(shape).numel()


def group(path, shapes, shard, shard_size):
    total = sum(map(numel, shapes.values()))
    padding = shard_size * SHARDS - total if shard == SHARDS - 1 else 0
    flat = {"names": list(shapes), "shapes": list(shapes.values()), "numels": list(map(numel, shapes.values()))}
    return {"fsdp_path": path, "params": {"flat_param_0": flat | {"padding": padding}}, "shared_param_info": []}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """992 files that claim 350 GB and take a few MB."""
    directory = tmp_path_factory.mktemp("opt-175b")
    arguments = argparse.Namespace(model_parallel_size=PARTS, decoder_attention_heads=96, dropout=0.1)
    root = {f"decoder.{name}": shape for name, shape in ROOT.items()}
    for part in range(PARTS):
        for shard in range(SHARDS):
            model = {"flat_param_0": TensorPlaceholder((ROOT_SHARD,), torch.float16)}
            metadata = [group("", root, shard, ROOT_SHARD)]
            for layer in range(LAYERS):
                model[f"decoder.layers.{layer}.flat_param_0"] = TensorPlaceholder((LAYER_SHARD,), torch.float16)
                metadata.append(group(f"decoder.layers.{layer}", LAYER, shard, LAYER_SHARD))
            content = {"cfg": {"model": arguments}, "model": model, "shard_metadata": {"param_metadata": metadata}}
            create_torch_file(directory / f"checkpoint_last-model_part-{part}-shard{shard}.pt", content)
    return directory


def test_sizes_are_the_releases():
    assert sum(map(numel, LAYER.values())) == 226_576_896 and sum(map(numel, ROOT.values())) == 102_432_768
    assert LAYER_SHARD * SHARDS - 226_576_896 == 120 and ROOT_SHARD * SHARDS - 102_432_768 == 36


@pytest.mark.timeout(120)
def test_every_tensor_is_found_and_random_elements_come_from_where_arithmetic_says(release):
    checkpoint = open_checkpoint(release)
    size = RELEASED_SIZES["opt-175b"]
    assert checkpoint.config.replace(name="opt-175b") == size.config
    assert sum(numel(source.shape) for source in checkpoint.tensors.values()) == size.num_parameters

    chooser = random.Random(3)
    for number in range(100):
        part, layer = chooser.randrange(PARTS), chooser.randrange(LAYERS)
        name = chooser.choice(["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"])
        row, column = chooser.randrange(H // PARTS), chooser.randrange(H // PARTS)
        # Where the element lies in the part's flat vector, counted by hand from the order of LAYER.
        before_fc1 = 3 * H // PARTS * H + 3 * H // PARTS + H * (H // PARTS) + 3 * H
        if name in ("k_proj", "v_proj", "q_proj"):
            place = (["k_proj", "v_proj", "q_proj"].index(name) * (H // PARTS) + row) * H + column
            index = (part * (H // PARTS) + row, column)
        elif name == "out_proj":
            place = 3 * H // PARTS * H + 3 * H // PARTS + row * (H // PARTS) + column
            index = (row, part * (H // PARTS) + column)
        elif name == "fc1":
            place = before_fc1 + row * H + column
            index = (part * (F // PARTS) + row, column)
        else:
            place = before_fc1 + F // PARTS * H + F // PARTS + row * (F // PARTS) + column
            index = (row, part * (F // PARTS) + column)
        shard, offset = divmod(place, LAYER_SHARD)
        file = release / f"checkpoint_last-model_part-{part}-shard{shard}.pt"
        vector = TorchFile(file).content["model"][f"decoder.layers.{layer}.flat_param_0"]
        position = vector.storage.byte(offset)
        value = torch.tensor([float(number + 1)]).half()
        with file.open("r+b") as handle:
            handle.seek(position)
            handle.write(value.numpy().tobytes())
        module = name if name.startswith("fc") else f"self_attn.{name}"
        block = tuple(slice(i, i + 1) for i in index)
        assert checkpoint.read(f"model.decoder.layers.{layer}.{module}.weight", block).item() == number + 1
