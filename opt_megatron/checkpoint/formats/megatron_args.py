"""Megatron-LM's arguments, which its files contain besides the model: how they are checked, and which are written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ...config import LAYERNORM_EPSILON, OPTConfig
from ...errors import CheckpointError
from .infer_config import integer

_EXPECTED = {
    "swiglu": False,
    "squared_relu": False,
    "untie_embeddings_and_output_weights": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "layernorm_epsilon": LAYERNORM_EPSILON,
    "add_bias_linear": True,
}


def check_arguments(arguments: dict[str, Any], directory: Path) -> None:
    """Check what `args` says against OPT's architecture.

    Raises:
        CheckpointError: the model is not an OPT.
    """
    for name, wanted in _EXPECTED.items():
        value = arguments.get(name, wanted)
        if type(value) in (bool, str, float) and value != wanted:
            raise CheckpointError(f"{directory}: args says {name}={value!r:.40}; in OPT it is {wanted!r}")


def check_layout(arguments: dict[str, Any], directory: Path, tp: int, pp: int) -> None:
    """Check what `args` says against the ranks' files that are here.

    Raises:
        CheckpointError: they are not all files of TP `tp` x PP `pp`.
    """
    sizes = [integer(arguments, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    if None not in sizes and sizes != [tp, pp]:
        raise CheckpointError(
            f"{directory}: rank files of TP{tp} x PP{pp} are here, but args says TP{sizes[0]} x PP{sizes[1]}: "
            "some are missing, or of another checkpoint"
        )


def megatron_args(config: OPTConfig, dtype: torch.dtype, tp: int, pp: int) -> argparse.Namespace:
    """The arguments that Megatron-LM compares on loading (primitive values only).

    They cannot say that OPT's activation is ReLU: Megatron-LM's command line has no such choice and its
    files do not carry one. Its `pretrain_gpt.py` needs `config.activation_func = torch.nn.functional.relu`.
    """
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.num_position_rows,  # rows of the table, OPT's two unused ones too
        "position_embedding_type": "learned_absolute",
        "add_position_embedding": True,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "swiglu": False,
        "squared_relu": False,
        "openai_gelu": False,
        "untie_embeddings_and_output_weights": False,
        "normalization": "LayerNorm",
        "layernorm_epsilon": LAYERNORM_EPSILON,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "padded_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "ckpt_format": "torch",
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }
    return argparse.Namespace(**values)
