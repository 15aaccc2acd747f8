"""The options of one run, with its model, schedule and files resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint.adapter import Adapter
from ..config import OPTConfig
from ..data.options import DataOptions, SupervisedOptions
from ..model.lora_options import LoRALayers, LoRAOptions
from .lr_schedule import LRSchedule
from .options import ExecutionOptions, MezoOptions, OptimizerOptions, SavingOptions, TrainerOptions
from .recipe import INIT_STD


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SavingOptions, ExecutionOptions):
    """All options of `train`.

    Attributes:
        config: the architecture, dropout included; in fine-tuning, the checkpoint's.
        load: a checkpoint whose weights the run starts with; None initialises them.
        base_model: the name of `load` as others know it (a Hub repository), or its path.
        adapter: LoRA's factors that are trained further, instead of new ones (`lora`).
        tokenizer: directory whose files are copied into the checkpoints (and which supervised data need).
        mezo: MeZO instead of Adam.
        dtype: of parameters and activations.
        run_file: the text of run.yaml, with which the run can be repeated; empty for none.
    """

    config: OPTConfig
    schedule: LRSchedule
    trainer: TrainerOptions
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    data: DataOptions | None = None
    supervised: SupervisedOptions | None = None
    load: str | None = None
    base_model: str | None = None
    revision: str | None = None
    tokenizer: Path | None = None
    lora: LoRAOptions | None = None
    adapter: Adapter | None = None
    mezo: MezoOptions | None = None
    dtype: torch.dtype = torch.float32
    init_std: float = INIT_STD
    run_file: str = ""

    @property
    def directory(self) -> Path | None:
        """The run's directory, or None if nothing is saved."""
        return None if self.save is None else Path(self.save).expanduser()

    @property
    def lora_layers(self) -> LoRALayers:
        """The layers that LoRA adapts; none of them if all weights are trained.

        Raises:
            UserError: the adapter adapts other weights too.
        """
        if self.adapter is not None:
            return self.adapter.megatron_layers(self.config)
        return {} if self.lora is None else self.lora.layers(self.config.num_layers)
