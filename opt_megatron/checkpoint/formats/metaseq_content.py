"""What metaseq's own programs read in a .pt file besides the tensors, and in the files beside it.

`wrap_part` makes the former: `cfg`, `extra_state` and `optimizer_history` are what its `_upgrade_state_dict` and model
builder ask for, `shard_metadata` is for its `reshard_consolidated` (facebookresearch/metaseq at f7ffa5f:
checkpoint_utils.py, models/transformer_lm.py, scripts/reshard_consolidated.py).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ...config import OPTConfig
from ..storage.torch_writer import TensorPlaceholder

COMPANIONS = ("gpt2-vocab.json", "gpt2-merges.txt", "dict.txt")
VERSION = "decoder.version"
_SPECIAL_TOKENS = 4  # <s>, <pad>, </s> and <unk>, which metaseq's Dictionary begins with
# The modules of an FSDP group in the order in which metaseq registers them: a group's vector has no names.
_ROOT = ("decoder.embed_tokens", "decoder.embed_positions", "decoder.layer_norm")
_LAYER_PATH = re.compile(r"decoder\.layers\.(\d+)\.")
_LAYER = ("self_attn.qkv_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")


def wrap_part(
    config: OPTConfig, dtype: torch.dtype, parts: int, *, fused: bool
) -> Callable[[dict[str, TensorPlaceholder]], dict[str, Any]]:
    """Makes what is saved of a part's tensors, for `OutputFile.wrap`.

    Args:
        dtype: of the weights, in which metaseq builds the model.
        fused: k, v and q are one tensor, as in metaseq's own modules; only such a model is flattened by FSDP.
    """

    def wrap(tensors: dict[str, TensorPlaceholder]) -> dict[str, Any]:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return {
            "cfg": {
                "_name": None,
                "model": _model_arguments(config, dtype, parts),
                "distributed_training": {"use_sharded_state": True},
            },
            "args": None,
            "model": tensors,
            "criterion": None,
            "optimizer_history": [
                {
                    "criterion_name": "VocabParallelCrossEntropyCriterion",
                    "optimizer_name": "MemoryEfficientFP16Optimizer",
                    "lr_scheduler_state": {"best": None},
                    "num_updates": 0,
                }
            ],
            "task_state": {},
            "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
            **({"shard_metadata": _shard_metadata(shapes)} if fused else {}),
        }

    return wrap


def _model_arguments(config: OPTConfig, dtype: torch.dtype, parts: int) -> argparse.Namespace:
    """`cfg.model`, of which metaseq builds the model: its defaults for what is missing are not OPT's."""
    return argparse.Namespace(
        _name="transformer_lm_megatron",
        arch="transformer_lm_megatron",
        model_parallel_size=parts,
        use_sharded_state=True,
        criterion="vocab_parallel_cross_entropy",
        decoder_layers=config.num_layers,
        decoder_embed_dim=config.hidden_size,
        decoder_ffn_embed_dim=config.ffn_hidden_size,
        decoder_attention_heads=config.num_attention_heads,
        decoder_input_dim=config.word_embed_proj_dim,
        decoder_output_dim=config.word_embed_proj_dim,
        decoder_learned_pos=True,
        decoder_normalize_before=config.do_layer_norm_before,
        no_scale_embedding=True,  # otherwise embeddings are multiplied by sqrt(hidden size), without a word
        max_target_positions=config.max_position_embeddings,
        tokens_per_sample=config.max_position_embeddings,
        activation_fn="relu",
        share_decoder_input_output_embed=True,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        memory_efficient_fp16=dtype != torch.float32,
        bf16=dtype == torch.bfloat16,
    )


def _shard_metadata(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """How FSDP flattens a part: a group for each layer, and one for the rest, whose output projection is tied."""
    layers = sorted({int(match[1]) for match in map(_LAYER_PATH.match, shapes) if match})
    root = _group("", _ROOT, shapes)
    root["shared_param_info"] = [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
    groups = [root, *(_group(f"decoder.layers.{layer}", _LAYER, shapes) for layer in layers)]
    return {"param_metadata": groups, "buffer_names": [VERSION]}


def _group(path: str, modules: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    stored = {name: torch.Size(shapes[prefix + name]) for name in names if prefix + name in shapes}
    flat = {
        "names": list(stored),
        "shapes": list(stored.values()),
        "numels": [shape.numel() for shape in stored.values()],
        "padding": 0,
    }
    return {
        "fsdp_path": path,
        "params": {"flat_param_0": flat},
        "no_broadcast_optim_state": False,
        "shared_param_info": [],
    }


def write_companions(directory: Path, vocab_size: int) -> list[str]:
    """Write the tokenizer's files under the names that metaseq opens, next to those that are there.

    Args:
        vocab_size: rows of the embedding over all parts.

    Returns:
        Sentences about what keeps metaseq from loading the directory.
    """
    vocab, merges, dictionary = (directory / name for name in COMPANIONS)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        shutil.copyfile(directory / "vocab.json", vocab)
        shutil.copyfile(directory / "merges.txt", merges)
    elif (directory / "tokenizer.json").is_file():
        Tokenizer.from_file(str(directory / "tokenizer.json")).model.save(str(directory), "gpt2")
    else:
        return [f"metaseq loads nothing without {COMPANIONS[0]} and {COMPANIONS[1]}: give --tokenizer DIR"]
    symbols = _dictionary(json.loads(vocab.read_text(encoding="utf-8")))
    dictionary.write_text("".join(f"{symbol} {count}\n" for symbol, count in symbols.items()), encoding="utf-8")
    rows = _SPECIAL_TOKENS + len(symbols)
    if rows != vocab_size:
        return [f"metaseq makes {rows} rows of this tokenizer, and will not load a model that has {vocab_size}"]
    return []


def _dictionary(vocab: dict[str, int]) -> dict[str, int]:
    """Symbol -> count of metaseq's Dictionary of a tokenizer, padded to a multiple of 8, without its special tokens.

    (metaseq: tasks/language_modeling.py, data/dictionary.py.)
    """
    symbols = dict.fromkeys(sorted(vocab, key=vocab.__getitem__)[_SPECIAL_TOKENS:], 1)
    number = 0
    while (_SPECIAL_TOKENS + len(symbols)) % 8:
        symbols.setdefault(f"madeupword{number:04d}", 0)
        number += 1
    return symbols
