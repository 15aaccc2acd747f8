"""Checkpoints of every format, written from the formats' descriptions with torch.save and safetensors alone.

Nothing here uses the readers, the writers or the parameter table: these files are what they are tested with.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

Tensors = dict[str, torch.Tensor]
D = "model.decoder."


def hf_config(**changes: object) -> dict:
    """A small config.json; post-norm and narrow where `changes` say so."""
    values = {
        "model_type": "opt",
        "vocab_size": 24,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 20,
        "max_position_embeddings": 8,
        "word_embed_proj_dim": 12,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "torch_dtype": "float16",
    }
    return values | changes


PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}
POST_NORM = {"do_layer_norm_before": False, "word_embed_proj_dim": 6}


def random_tensors(config: dict, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensors:
    """Hugging Face's tensors of a model, all different."""
    generator = torch.Generator().manual_seed(seed)
    v, h, f, w = (config[k] for k in ("vocab_size", "hidden_size", "ffn_dim", "word_embed_proj_dim"))
    shapes = {"embed_tokens.weight": (v, w), "embed_positions.weight": (config["max_position_embeddings"] + 2, h)}
    if config["do_layer_norm_before"]:
        shapes |= {"final_layer_norm.weight": (h,), "final_layer_norm.bias": (h,)}
    if w != h:
        shapes |= {"project_in.weight": (h, w), "project_out.weight": (w, h)}
    for layer in range(config["num_hidden_layers"]):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"layers.{layer}.self_attn.{name}.weight": (h, h), f"layers.{layer}.self_attn.{name}.bias": (h,)}
        shapes |= {f"layers.{layer}.fc1.weight": (f, h), f"layers.{layer}.fc1.bias": (f,)}
        shapes |= {f"layers.{layer}.fc2.weight": (h, f), f"layers.{layer}.fc2.bias": (h,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"layers.{layer}.{name}.weight": (h,), f"layers.{layer}.{name}.bias": (h,)}
    return {D + name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def cut(name: str, tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """A model-parallel part's slice, by the split rules of metaseq and FlagAI."""
    module = name.split(".")[-2]
    if module in ("embed_tokens", "q_proj", "k_proj", "v_proj", "fc1"):
        return tensor.chunk(parts, dim=0)[part].clone()
    if module in ("out_proj", "fc2") and name.endswith("weight"):
        return tensor.chunk(parts, dim=1)[part].clone()
    return tensor.clone()


def write_hf(directory: Path, config: dict, tensors: Tensors) -> Path:
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def metaseq_part(config: dict, tensors: Tensors, part: int, parts: int, *, fused: bool = True) -> Tensors:
    """One part under metaseq's names: k, v and q fused in that order, or separate."""
    renamed: Tensors = {"decoder.version": torch.tensor([3.0])}
    for name, tensor in tensors.items():
        short = name.removeprefix(D)
        short = {"final_layer_norm.weight": "layer_norm.weight", "final_layer_norm.bias": "layer_norm.bias"}.get(
            short, short
        )
        short = short.replace("project_in.", "project_in_dim.").replace("project_out.", "project_out_dim.")
        renamed["decoder." + short] = cut(name, tensor, part, parts)
    if fused:
        for layer in range(config["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                prefix = f"decoder.layers.{layer}.self_attn."
                three = [renamed.pop(f"{prefix}{letter}_proj.{kind}") for letter in "kvq"]
                renamed[f"{prefix}qkv_proj.{kind}"] = torch.cat(three)
    return renamed


def metaseq_content(config: dict, model: Tensors, parts: int, **extra: object) -> dict:
    """The dictionary around the tensors, with an object of a class that no reader can import."""
    arguments = argparse.Namespace(
        arch="transformer_lm_megatron",
        model_parallel_size=parts,
        decoder_layers=config["num_hidden_layers"],
        decoder_attention_heads=config["num_attention_heads"],
        dropout=0.1,
        attention_dropout=0.0,
        self_attn_doc_sep=-1,
    )
    return {
        "cfg": {"_name": None, "model": arguments},
        "model": model,
        "criterion": None,
        "optimizer_history": [{"num_updates": 100}],
        "task_state": {},
        "extra_state": {"train_iterator": _foreign_object()},
        **extra,
    }


def _foreign_object() -> object:
    module = types.ModuleType("metaseq_that_is_not_installed")
    cls = type("Iterator", (), {"__module__": module.__name__})
    module.Iterator = cls
    sys.modules[module.__name__] = module
    instance = cls()
    instance.offset = 7
    return instance


def load(path: Path) -> dict:
    """torch.load of a file that `save` wrote, the foreign class made known for the moment."""
    _foreign_object()
    content = torch.load(path, weights_only=False)
    sys.modules.pop("metaseq_that_is_not_installed", None)
    return content


def save(content: object, path: Path) -> None:
    """torch.save, after which the foreign class is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict) and "extra_state" in content:
        content["extra_state"]["train_iterator"] = _foreign_object()
    torch.save(content, path)
    sys.modules.pop("metaseq_that_is_not_installed", None)


def write_metaseq_parts(
    directory: Path, config: dict, tensors: Tensors, parts: int, name: str = "reshard-model_part-{}.pt"
) -> Path:
    """Unflattened parts."""
    for part in range(parts):
        model = metaseq_part(config, tensors, part, parts)
        save(metaseq_content(config, model, parts), directory / name.format(part))
    return directory


def write_metaseq_singleton(directory: Path, config: dict, tensors: Tensors, *, fused: bool, name: str) -> Path:
    """The whole model in one file, in either dialect."""
    save(metaseq_content(config, metaseq_part(config, tensors, 0, 1, fused=fused), 1), directory / name)
    return directory


def flat_groups(part: Tensors, layers: int) -> dict[str, list[str]]:
    """FSDP path -> names in the order in which they are flattened."""
    root = [n for n in part if ".layers." not in n and n != "decoder.version"]
    order = ["embed_tokens.weight", "embed_positions.weight", "layer_norm.weight", "layer_norm.bias"]
    root.sort(key=lambda n: order.index(n.removeprefix("decoder.")))
    names = ["self_attn.qkv_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    groups = {"": root}
    for layer in range(layers):
        path = f"decoder.layers.{layer}"
        groups[path] = [f"{path}.{name}.{kind}" for name in names for kind in ("weight", "bias")]
    return groups


def write_metaseq_flat(directory: Path, config: dict, tensors: Tensors, parts: int, shards: int) -> Path:
    """Flattened parts, in one piece each or as raw FSDP shards: every piece padded to the length of the first."""
    for part in range(parts):
        whole = metaseq_part(config, tensors, part, parts)
        models = [{"decoder.version": torch.tensor([3.0])} for _ in range(shards)]
        metadata: list[list[dict]] = [[] for _ in range(shards)]
        for path, names in flat_groups(whole, config["num_hidden_layers"]).items():
            vector = torch.cat([whole[name].flatten() for name in names])
            pieces = list(vector.chunk(shards))
            pieces += [vector[:0]] * (shards - len(pieces))
            for shard, piece in enumerate(pieces):
                padding = len(pieces[0]) - len(piece)
                key = f"{path}.flat_param_0" if path else "flat_param_0"
                models[shard][key] = torch.cat([piece, piece.new_zeros(padding)])
                flat = {
                    "names": [name.removeprefix(f"{path}.") for name in names],
                    "shapes": [whole[name].shape for name in names],
                    "numels": [whole[name].numel() for name in names],
                    "padding": padding,
                }
                entry = {"fsdp_path": path, "params": {"flat_param_0": flat}, "no_broadcast_optim_state": False}
                metadata[shard].append(entry | {"shared_param_info": []})
        for shard in range(shards):
            name = (
                f"checkpoint_last-model_part-{part}-shard{shard}.pt" if shards > 1 else f"reshard-model_part-{part}.pt"
            )
            extra = {"shard_metadata": {"param_metadata": metadata[shard], "buffer_names": ["decoder.version"]}}
            save(metaseq_content(config, models[shard], parts, **extra), directory / name)
    return directory


def write_flagai(directory: Path, config: dict, tensors: Tensors, parts: int) -> Path:
    """pytorch_model.bin, or numbered parts with every name once more beside the slices."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    head = {"lm_head.weight": tensors[D + "embed_tokens.weight"].clone()}
    if parts == 1:
        torch.save({"module": tensors | head}, directory / "pytorch_model.bin")
        return directory
    for part in range(parts):
        module = {name: cut(name, tensor, part, parts) for name, tensor in tensors.items()} | head
        torch.save({"module": module} | dict.fromkeys(module), directory / f"pytorch_model_{part:02d}.bin")
    return directory


def write_megatron_lm(
    directory: Path, config: dict, tensors: Tensors, tp: int, pp: int, *, te: bool = False, iteration: int = 1000
) -> Path:
    """A plain Megatron-LM GPT checkpoint of an OPT: vocabulary padded, no config.json, args beside the model.

    Args:
        te: with TransformerEngine's names for the norms, and its extra state.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    d = hidden // heads
    rows = config["vocab_size"]
    padded = -(-rows // (16 * tp)) * 16 * tp
    embedding = torch.cat([tensors[D + "embed_tokens.weight"], torch.full((padded - rows, hidden), 9.0).half()])
    arguments = argparse.Namespace(
        num_attention_heads=heads,
        hidden_size=hidden,
        padded_vocab_size=padded,
        max_position_embeddings=config["max_position_embeddings"] + 2,
        hidden_dropout=0.1,
        attention_dropout=0.0,
    )
    per_stage = config["num_hidden_layers"] // pp
    for stage in range(pp):
        for rank in range(tp):
            model: dict = {}
            if stage == 0:
                model["embedding.word_embeddings.weight"] = embedding.chunk(tp)[rank].clone()
                model["embedding.position_embeddings.weight"] = tensors[D + "embed_positions.weight"]
            for local in range(per_stage):
                theirs, ours = f"{D}layers.{stage * per_stage + local}.", f"decoder.layers.{local}."
                norm1 = "self_attention.linear_qkv.layer_norm_" if te else "input_layernorm."
                norm2 = "mlp.linear_fc1.layer_norm_" if te else "pre_mlp_layernorm."
                for kind in ("weight", "bias"):
                    model[f"{ours}{norm1}{kind}"] = tensors[f"{theirs}self_attn_layer_norm.{kind}"]
                    model[f"{ours}{norm2}{kind}"] = tensors[f"{theirs}final_layer_norm.{kind}"]
                    three = [tensors[f"{theirs}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                    fused = [t[h * d : (h + 1) * d] for h in range(heads) for t in three]
                    model[f"{ours}self_attention.linear_qkv.{kind}"] = torch.cat(fused).chunk(tp)[rank].clone()
                    model[f"{ours}mlp.linear_fc1.{kind}"] = tensors[f"{theirs}fc1.{kind}"].chunk(tp)[rank].clone()
                for name, source in (("self_attention.linear_proj", "self_attn.out_proj"), ("mlp.linear_fc2", "fc2")):
                    model[f"{ours}{name}.weight"] = tensors[f"{theirs}{source}.weight"].chunk(tp, dim=1)[rank].clone()
                    model[f"{ours}{name}.bias"] = tensors[f"{theirs}{source}.bias"]
                    if te:
                        model[f"{ours}{name}._extra_state"] = torch.zeros(3)
            if stage == pp - 1:
                for kind in ("weight", "bias"):
                    model[f"decoder.final_layernorm.{kind}"] = tensors[f"{D}final_layer_norm.{kind}"]
                if pp > 1:
                    model["output_layer.weight"] = embedding.chunk(tp)[rank].clone()
            folder = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            path = directory / f"iter_{iteration:07d}" / folder / "model_optim_rng.pt"
            content = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration, "model": model}
            save(content | {"rng_state": [{"random_rng_state": (3, (1, 2), None)}]}, path)
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def write_peft(
    directory: Path,
    weights: Tensors,
    ranks: dict[str, int],
    prefix: str = "base_model.model.model.decoder.",
    **config: Any,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter of peft for a model's weights, with random factors.

    Args:
        ranks: rank of each module that is adapted ("layers.0.fc1").
        config: fields of adapter_config.json besides PEFT_CONFIG's, or instead of them.

    Returns:
        A and B of each weight.
    """
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    factors, stored = {}, {}
    for module, rank in ranks.items():
        rows, columns = weights[f"{D}{module}.weight"].shape
        a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, columns), (rows, rank)))
        factors[f"{D}{module}.weight"] = a, b
        stored |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    save_file(stored, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | config))
    return factors


def write_torch_dist(directory: Path, config: dict, tensors: Tensors, *, stacked: bool, iteration: int = 7) -> Path:
    """torch_dist as TP 2 saves it, with a vocabulary that needs no padding and no config.json.

    Args:
        stacked: all layers of a parameter are one tensor; else each layer has its own.
    """
    layers = [megatron_layer(config, tensors, layer) for layer in range(config["num_hidden_layers"])]
    shards = {}
    for name in layers[0]:
        for number, layer in enumerate(layers):
            if stacked:
                pieces = [((number, *at), piece[None]) for at, piece in _tensor_parallel_pieces(name, layer[name])]
                shards.setdefault(f"decoder.layers.{name}", []).extend(pieces)
            else:
                shards[f"decoder.layers.{number}.{name}"] = _tensor_parallel_pieces(name, layer[name])
    for name, source in {
        "embedding.word_embeddings.weight": "embed_tokens.weight",
        "embedding.position_embeddings.weight": "embed_positions.weight",
        "decoder.final_layernorm.weight": "final_layer_norm.weight",
        "decoder.final_layernorm.bias": "final_layer_norm.bias",
    }.items():
        shards[name] = _tensor_parallel_pieces(name, tensors[D + source])
    path = directory / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    write_dcp(path, shards)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    arguments = argparse.Namespace(num_attention_heads=heads, hidden_size=hidden, params_dtype=torch.float16)
    torch.save({"args": arguments, "checkpoint_version": 3.0, "iteration": iteration}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def megatron_layer(config: dict, tensors: Tensors, layer: int) -> Tensors:
    """A layer's whole tensors under Megatron-core's names, with TransformerEngine's for the norms."""
    heads = config["num_attention_heads"]
    found: Tensors = {}
    for kind in ("weight", "bias"):
        modules = ("self_attn_layer_norm", "self_attn.out_proj", "fc1", "fc2", "final_layer_norm")
        norm, out, fc1, fc2, final_norm = (tensors[f"{D}layers.{layer}.{name}.{kind}"] for name in modules)
        three = [tensors[f"{D}layers.{layer}.self_attn.{letter}_proj.{kind}"].chunk(heads) for letter in "qkv"]
        found[f"self_attention.linear_qkv.{kind}"] = torch.cat([part[head] for head in range(heads) for part in three])
        found |= {f"self_attention.linear_qkv.layer_norm_{kind}": norm, f"self_attention.linear_proj.{kind}": out}
        found |= {f"mlp.linear_fc1.{kind}": fc1, f"mlp.linear_fc1.layer_norm_{kind}": final_norm}
        found |= {f"mlp.linear_fc2.{kind}": fc2}
    return found


Shards = list[tuple[tuple[int, ...], torch.Tensor]]  # (offsets, values)


def _tensor_parallel_pieces(name: str, tensor: torch.Tensor) -> Shards:
    is_norm = "layer_norm" in name or "layernorm" in name
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        left, right = tensor.chunk(2, dim=1)
        return [((0, 0), left), ((0, left.shape[1]), right)]
    if not is_norm and ("linear_qkv" in name or "linear_fc1" in name or "word_embeddings" in name):
        first, second = tensor.chunk(2)
        return [((0,) * tensor.dim(), first), ((len(first), *[0] * (tensor.dim() - 1)), second)]
    return [((0,) * tensor.dim(), tensor)]


def write_dcp(path: Path, shards: dict[str, Shards]) -> None:
    """`.metadata` and the files of two ranks, as torch.distributed.checkpoint writes them."""
    content = [io.BytesIO(), io.BytesIO()]
    entries, places = {}, {}
    for name, pieces in shards.items():
        chunks = []
        for number, (offsets, values) in enumerate(pieces):
            file, start = content[number % 2], content[number % 2].tell()
            saved = io.BytesIO()
            torch.save(values.clone(), saved)
            file.write(saved.getvalue())
            place = _StorageInfo(f"__{number % 2}_0.distcp", start, len(saved.getvalue()))
            places[dcp.MetadataIndex(name, offsets)] = place
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), values.shape))
        ends = [[at + size for at, size in zip(offsets, values.shape, strict=True)] for offsets, values in pieces]
        size = torch.Size(map(max, zip(*ends, strict=True)))
        properties = dcp.TensorProperties(dtype=pieces[0][1].dtype)
        entries[name] = dcp.TensorStorageMetadata(properties, size, chunks)
    entries["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = dcp.BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(entries, storage_data=places)))
    for number, file in enumerate(content):
        (path / f"__{number}_0.distcp").write_bytes(file.getvalue())
