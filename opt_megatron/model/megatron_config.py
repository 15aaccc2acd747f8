"""OPTConfig -> Megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from ..config import LAYERNORM_EPSILON, OPTConfig
from ..parallel.context import ParallelContext


def transformer_config(
    config: OPTConfig, parallel: ParallelContext, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron-core's config of an OPT model at this context's layout; weights are not initialised.

    Args:
        dtype: of the parameters and of the hidden states that pipeline stages send.
        overrides: any fields of TransformerConfig, for training (dropout is OPT's unless given).
    """
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        # Megatron-LM's command line does not offer ReLU; the config accepts it.
        "activation_func": torch.nn.functional.relu,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "layernorm_epsilon": LAYERNORM_EPSILON,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        # Core's attention divides by sqrt(d) itself; ours scales the query, as transformers does.
        "softmax_scale": config.head_dim**-0.5,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "transformer_impl": "local",
        # Weights are loaded into empty memory; on CUDA it is allocated where it is used.
        "use_cpu_initialization": parallel.device.type == "cpu",
        "perform_initialization": False,
        # Fusions that are jit-compiled for CUDA and change rounding.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(values | overrides))
