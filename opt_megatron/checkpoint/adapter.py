"""`Adapter`: LoRA's factors for the weights of a model, from a peft directory or from a run of `train --lora-rank`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import OPTConfig
from ..errors import UserError, shorten
from ..model.lora_options import LORA_TARGETS, LoRALayer, LoRALayers
from .parameter_mapping import stage_parameters
from .storage.lora_weight import LoRAFactors, LoRAWeight

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Adapter:
    """LoRA's factors, none of them read yet.

    Attributes:
        path: the directory that holds them.
        factors: canonical name of a weight -> the factors of what is added to it.
        base_model: name or path of the model that they were trained on, if it is known.
        dropout: of their inputs, where they were trained.
    """

    path: Path
    factors: dict[str, LoRAFactors]
    base_model: str | None = None
    dropout: float = 0.0

    def megatron_layers(self, config: OPTConfig) -> LoRALayers:
        """The layers of a model that is trained further with these factors.

        Raises:
            UserError: training cannot adapt one of the weights.
        """
        layers: LoRALayers = {}
        left = set(self.factors)
        for parameter in stage_parameters(config, range(config.num_layers), first=True, last=True):
            module = parameter.megatron.removesuffix(".weight")
            factors = [self.factors.get(name) for name in parameter.canonical]
            scales = [found.scale for found in factors if found is not None]
            if scales and module.rpartition(".")[2] in LORA_TARGETS:
                ranks = tuple(0 if found is None else found.rank for found in factors)
                layers[module] = LoRALayer(max(scales, key=abs), ranks)
                left.difference_update(parameter.canonical)
        if left:
            raise UserError(
                f"{self.path}: adapts {shorten(sorted(left), 3)}, which training cannot; merge it: convert --adapter"
            )
        return layers


def add_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the factors added to its weights as they are read.

    Raises:
        CheckpointError: the shapes do not fit each other.
    """
    merged = {
        name: LoRAWeight(checkpoint.tensors[name], factors)
        for name, factors in adapter.factors.items()
        if name in checkpoint.tensors  # a missing one is named by Checkpoint.check_tensors
    }
    return replace(
        checkpoint,
        tensors=checkpoint.tensors | merged,
        format_description=f"{checkpoint.format_description} with LoRA",
        adapter=adapter,
    )
