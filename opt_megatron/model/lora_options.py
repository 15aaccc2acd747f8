"""The options of LoRA (`model/lora.py`), and which layers they adapt. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import Options, option

_MODULES = {  # target: its place in a layer
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
LORA_TARGETS = tuple(_MODULES)


@dataclass(frozen=True)
class LoRALayer:
    """What is added to one of Megatron's linear layers: scale B A.

    Attributes:
        ranks: one number; or, where q, k and v have an A each, one for each of the three (0: it is not adapted).
    """

    scale: float
    ranks: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Rows of the layer's A: those of q, k and v lie one after another."""
        return sum(self.ranks)


LoRALayers = dict[str, LoRALayer]  # "decoder.layers.3.mlp.linear_fc1", numbered as in the whole model -> its LoRA


def are_alike(layers: LoRALayers, num_layers: int) -> bool:
    """Whether every layer of the model has the same modules adapted, of the same ranks."""
    by_number: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_layers)]
    for name, layer in layers.items():
        number, _, module = name.removeprefix("decoder.layers.").partition(".")
        by_number[int(number)][module] = layer.ranks
    return all(modules == by_number[0] for modules in by_number)


@dataclass(frozen=True)
class LoRAOptions(Options):
    """What to adapt and how much. Megatron's `linear_qkv` is q, k and v in one: they share A."""

    rank: int = option(
        help="train LoRA factors of this rank; 0 trains all weights",
        argument="lora_rank",
        minimum=0,
        must="not be negative",
        metavar="R",
        default_text="0",
    )
    alpha: float = option(
        16.0,
        help="the update is scaled by A / R",
        argument="lora_alpha",
        above=0,
        must="be a positive number",
        metavar="A",
    )
    target_modules: tuple[str, ...] = option(
        LORA_TARGETS,
        help=f"layers to adapt, of {' '.join(LORA_TARGETS)}",
        argument="lora_target_modules",
        nargs="+",
        metavar="NAME",
        default_text="all of them",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UserError(f"--lora-rank is {self.rank}, but must be at least 1")
        unknown = [name for name in self.target_modules if name not in LORA_TARGETS]
        if unknown or not self.target_modules:
            raise UserError(
                f"--lora-target-modules has {', '.join(unknown) or 'nothing'}: choose from {', '.join(LORA_TARGETS)}"
            )

    def layers(self, num_layers: int) -> LoRALayers:
        """The layers that are adapted."""
        layer = LoRALayer(self.alpha / self.rank, (self.rank,))
        modules = [_MODULES[target] for target in self.target_modules]
        return {f"decoder.layers.{number}.{module}": layer for number in range(num_layers) for module in modules}
