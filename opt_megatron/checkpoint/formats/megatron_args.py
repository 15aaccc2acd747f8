"""Megatron-LM's arguments, which its files contain besides the model: how they are checked, and which are written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ...config import LAYERNORM_EPSILON, OPTConfig
from ...errors import CheckpointError
from ..conversion_options import ConversionOptions
from .infer_config import integer

# What changes the function of a GPT model: OPT's values. Few of them show in a tensor's name or shape.
# (Megatron-LM, megatron/training/argument_utils.py and gpt_builders.py; megatron-core 0.16.1, TransformerConfig.)
_OPTS_VALUES: dict[str, tuple[Any, ...]] = {
    # The activation. No flag says ReLU, so these can only say that it is another one.
    "swiglu": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "onnx_safe": (False, None),
    "gated_linear_unit": (False,),
    "activation_func": ("relu",),
    # Attention.
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    # Norms and residuals.
    "normalization": ("LayerNorm",),
    "layernorm_epsilon": (LAYERNORM_EPSILON,),
    "norm_epsilon": (LAYERNORM_EPSILON,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "enable_mhc_connections": (False,),
    # Embeddings and output.
    "position_embedding_type": ("learned_absolute",),
    "add_position_embedding": (True,),
    "use_rotary_position_embeddings": (False,),
    "untie_embeddings_and_output_weights": (False,),
    "use_mup": (False,),
    "mtp_num_layers": (None, 0),
    # Other layers.
    "add_bias_linear": (True,),
    "num_experts": (None, 0),
    "spec": (None,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
}
_PLAIN = (bool, int, float, str, type(None))


def check_arguments(arguments: dict[str, Any], directory: Path) -> None:
    """Check what `args` says against OPT's architecture.

    Raises:
        CheckpointError: the model is not an OPT; it names the argument.
    """
    for name, allowed in _OPTS_VALUES.items():
        value = arguments.get(name, allowed[0])
        if type(value) not in _PLAIN or value not in allowed:
            raise CheckpointError(f"{directory}: args says {name}={_shown(value)}; in OPT it is {allowed[0]!r}")


def check_sizes(arguments: dict[str, Any], config: OPTConfig, directory: Path) -> None:
    """Check the sizes in `args` that no shape shows against the config.

    Raises:
        CheckpointError: the heads are others, or scores are scaled otherwise.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    wanted: dict[str, tuple[Any, ...]] = {
        "num_layers": (config.num_layers, None),
        "hidden_size": (config.hidden_size, None),
        "num_attention_heads": (heads, None),
        "kv_channels": (head_dim, None),
        "softmax_scale": (head_dim**-0.5, None),
    }
    if arguments.get("group_query_attention") is True:
        wanted["num_query_groups"] = (heads,)
    for name, allowed in wanted.items():
        value = arguments.get(name, allowed[0])
        if type(value) not in _PLAIN or value not in allowed:
            raise CheckpointError(
                f"{directory}: args says {name}={_shown(value)}; for the config's {config.num_layers} layers of "
                f"hidden size {config.hidden_size} and {heads} heads it is {allowed[0]}"
            )


def _shown(value: Any) -> str:
    """A value of an untrusted pickle, of which nothing but plain values may be printed."""
    if type(value) in (tuple, list) and len(value) <= 4 and all(type(item) in _PLAIN for item in value):
        return repr(value)[:60]
    return repr(value)[:40] if type(value) in _PLAIN else f"({type(value).__name__})"


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


def megatron_args(config: OPTConfig, dtype: torch.dtype, options: ConversionOptions) -> argparse.Namespace:
    """The arguments that Megatron-LM compares on loading (primitive values only).

    They cannot say that OPT's activation is ReLU, and at which row of the table positions begin: `MegatronFormat.notes`
    says both to the user.
    """
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings + options.position_offset,  # rows
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
        "padded_vocab_size": config.padded_vocab_size(options.tensor_model_parallel_size),
        "make_vocab_size_divisible_by": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": options.tensor_model_parallel_size,
        "pipeline_model_parallel_size": options.pipeline_model_parallel_size,
        "ckpt_format": "torch",
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }
    return argparse.Namespace(**values)
