"""The options of LoRA (`model/lora.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from ..options import Options, option

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


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

    @property
    def scale(self) -> float:
        """The factor of the update, alpha / rank."""
        return self.alpha / self.rank
