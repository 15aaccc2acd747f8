"""OPT's two kinds of layer as Megatron-core TransformerLayer specs.

pre-norm (every size but 350m)          post-norm (350m)
    x + attention(norm(x))                  norm(x + attention(x))
    x + mlp(norm(x))                        norm(x + mlp(x))
    and a final norm                        and none

In the post-norm layer both norms before a sublayer are identities, and a module that also normalises
replaces the two bias-dropout-add steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from ..config import OPTConfig
from .attention import OPTCoreAttention
from .linear import OPTColumnParallelLinear, OPTRowParallelLinear, mark_sequence_parallel
from .linear_methods.base import LinearMethod
from .lora import LoRAColumnParallelLinear, LoRARowParallelLinear
from .lora_options import LoRALayers
from .parameter_names import TRANSFORMER_ENGINE_NAMES


class OPTLayerNorm(nn.LayerNorm):
    """torch's LayerNorm. Core's wrapper of it does not support sequence parallelism, where each tensor parallel
    rank normalises its part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            mark_sequence_parallel(parameter, config.sequence_parallel)


class BiasDropoutAddNorm(MegatronModule):
    """350m: normalises after the residual add; used in place of a pre-norm layer's bias-dropout-add."""

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__(config=config)
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor], Tensor, float], Tensor]:
        """Return a function of (output and bias, residual, dropout), as core calls it."""
        add = get_bias_dropout_add(training, fused)
        return lambda output_and_bias, residual, dropout: self.norm(add(output_and_bias, residual, dropout))


def norm_implementation(device: torch.device) -> Any:
    """The LayerNorm class: NVIDIA Apex's or TransformerEngine's fused one on CUDA, else torch's.

    Apex's and TransformerEngine's have not yet been run on a GPU.
    """
    if device.type == "cuda":
        from megatron.core.fusions import fused_layer_norm

        if fused_layer_norm.HAVE_FUSED_LAYER_NORM:  # the persistent kernel alone knows some sizes only
            return fused_layer_norm.FusedLayerNorm
        try:
            import transformer_engine  # noqa: F401
            from megatron.core.extensions.transformer_engine import TENorm

            return TENorm
        except ImportError:
            pass
    return OPTLayerNorm


def block_spec(
    config: OPTConfig,
    core_config: TransformerConfig,
    device: torch.device,
    method: type[LinearMethod],
    lora: LoRALayers,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm where the model has one."""
    if core_config.transformer_impl == "transformer_engine":
        return _transformer_engine_block(config, core_config)
    norm = norm_implementation(device)
    first = get_transformer_layer_offset(core_config)
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, core_config, norm, _linear_layers(method, lora, number))
            for number in range(first, first + get_num_layers_to_build(core_config))
        ],
        layer_norm=norm if config.has_final_layer_norm else None,
    )


def _transformer_engine_block(config: OPTConfig, core_config: TransformerConfig) -> TransformerBlockSubmodules:
    """Core's own spec for TransformerEngine, which must be installed: pre-norm layers. It has not yet been run."""
    block = get_gpt_decoder_block_spec(core_config, use_transformer_engine=True)
    return block if config.has_final_layer_norm else replace(block, layer_norm=None)


def layer_spec(
    config: OPTConfig,
    core_config: TransformerConfig,
    norm: Any,
    linear: dict[str, ModuleSpec],
) -> ModuleSpec:
    """One layer, pre-norm or post-norm as the config says, with the given linear layers."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear["linear_qkv"],
            core_attention=OPTCoreAttention,
            linear_proj=linear["linear_proj"],
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=linear["linear_fc1"], linear_fc2=linear["linear_fc2"])
    )
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
            sharded_state_dict_keys_map=TRANSFORMER_ENGINE_NAMES,
        ),
    )


# A layer's linear layers -> the ordinary class, and the one with LoRA's factors.
_LINEAR_LAYERS = {
    "self_attention.linear_qkv": (OPTColumnParallelLinear, LoRAColumnParallelLinear),
    "self_attention.linear_proj": (OPTRowParallelLinear, LoRARowParallelLinear),
    "mlp.linear_fc1": (OPTColumnParallelLinear, LoRAColumnParallelLinear),
    "mlp.linear_fc2": (OPTRowParallelLinear, LoRARowParallelLinear),
}


def _linear_layers(method: type[LinearMethod], lora: LoRALayers, number: int) -> dict[str, ModuleSpec]:
    """The specs of the four linear layers of the model's layer `number`, under core's names."""
    specs = {}
    for name, (ordinary, adapted) in _LINEAR_LAYERS.items():
        layer = lora.get(f"decoder.layers.{number}.{name}")
        if layer is None:
            spec = ModuleSpec(module=ordinary, params={"method": method})
        else:
            spec = ModuleSpec(module=adapted, params={"method": method, "lora": layer})
        specs[name.rpartition(".")[2]] = spec
    return specs
