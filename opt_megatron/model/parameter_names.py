"""The names of a layer's norms in Megatron-core's two layer specs. Imports no torch.

TransformerEngine's fused modules contain the norm that comes before them; all other parameters have one name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Local spec -> TransformerEngine's. In torch_dist checkpoints the norms have the latter names, whatever computes
# them, so that a model of either spec can load them (core's get_gpt_layer_local_spec).
TRANSFORMER_ENGINE_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def local_name(name: str) -> str:
    """A parameter's name in the local spec, also where it has TransformerEngine's."""
    for ours, theirs in TRANSFORMER_ENGINE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def local_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model of either spec, under their names in the local one."""
    return {local_name(name): parameter for name, parameter in model.named_parameters()}


def whole_model_name(name: str, first_layer: int) -> str:
    """A name of a pipeline stage that begins with layer `first_layer`, with the layer's number in the whole model."""
    before, _, after = name.partition(".layers.")
    number, _, rest = after.partition(".")
    return f"{before}.layers.{int(number) + first_layer}.{rest}"
