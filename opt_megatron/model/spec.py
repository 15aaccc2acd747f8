"""OPT's two kinds of layer as Megatron-core TransformerLayer specs.

pre-norm (every size but 350m)          post-norm (350m)
    x + attention(norm(x))                  norm(x + attention(x))
    x + mlp(norm(x))                        norm(x + mlp(x))
    and a final norm                        and none

In the post-norm layer both norms before a sublayer are identities, and the two bias-dropout-add steps
are replaced by a module that also normalises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from ..config import OPTConfig
from .attention import OPTCoreAttention
from .linear import Int8ColumnParallelLinear, Int8RowParallelLinear, OPTColumnParallelLinear, OPTRowParallelLinear

# What stands in a layer's places for linear layers, by the kind of quantisation: (column, row) parallel.
LINEAR_LAYERS = {
    None: (OPTColumnParallelLinear, OPTRowParallelLinear),
    "int8": (Int8ColumnParallelLinear, Int8RowParallelLinear),
}


class BiasDropoutAddNorm(MegatronModule):
    """350m: normalise after the residual add. Stands where a pre-norm layer has its bias-dropout-add."""

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__(config=config)
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor], Tensor, float], Tensor]:
        """Core's calling convention: returns the function of (output and bias, residual, dropout)."""
        add = get_bias_dropout_add(training, fused)
        return lambda output_and_bias, residual, dropout: self.norm(add(output_and_bias, residual, dropout))


def norm_implementation(device: torch.device) -> Any:
    """The LayerNorm module: NVIDIA Apex's or TransformerEngine's fused one on CUDA, else torch's.

    The CUDA branches have not been run on a GPU yet.
    """
    if device.type == "cuda":
        from megatron.core.fusions import fused_layer_norm

        if fused_layer_norm.HAVE_FUSED_LAYER_NORM or fused_layer_norm.HAVE_PERSIST_LAYER_NORM:
            return fused_layer_norm.FusedLayerNorm
        try:
            import transformer_engine  # noqa: F401
            from megatron.core.extensions.transformer_engine import TENorm

            return TENorm
        except ImportError:
            pass
    return WrappedTorchNorm


def block_spec(
    config: OPTConfig, core_config: TransformerConfig, device: torch.device, quantization: str | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm where the model has one."""
    norm = norm_implementation(device)
    layer = layer_spec(config, core_config, norm, quantization)
    num_layers = get_num_layers_to_build(core_config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * num_layers,
        layer_norm=norm if config.has_final_layer_norm else None,
    )


def layer_spec(
    config: OPTConfig, core_config: TransformerConfig, norm: Any, quantization: str | None = None
) -> ModuleSpec:
    """One layer, pre-norm or post-norm as the config says, with linear layers of the given kind."""
    column, row = LINEAR_LAYERS[quantization]
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=OPTCoreAttention,
            linear_proj=row,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
    if config.do_layer_norm_before:
        before, after = norm, get_bias_dropout_add
    else:
        before = IdentityOp
        after = ModuleSpec(module=BiasDropoutAddNorm, params={"config": core_config, "norm": norm})
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=after,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=after,
        ),
    )
