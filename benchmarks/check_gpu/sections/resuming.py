"""Saving and resuming: what is resumed from a checkpoint takes the same next step, to the bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opt_megatron.config import OPTConfig
from opt_megatron.model.lora_options import LoRAOptions
from opt_megatron.parallel.context import ParallelContext
from opt_megatron.training.checkpointing.manager import CheckpointManager, TrainingState
from opt_megatron.training.options import OptimizerOptions

from ...training_systems import training_model, training_step
from ...workload import make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..settings import Settings

_KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "distributed optimizer": {"optimizer": OptimizerOptions(use_distributed_optimizer=True)},
    "recomputed activations": {"recompute_granularity": "full"},
    "fused cross-entropy": {"cross_entropy_loss_fusion": True},
    "LoRA": {"lora": LoRAOptions(4)},
}
_TRANSFORMER_ENGINE = {"TransformerEngine": {"transformer_impl": "transformer_engine"}}


def cases(settings: Settings) -> Iterator[Case]:
    """Every kind of training, with the embedded model; bfloat16 if the kind is not another dtype.

    With toy sizes the first and the last kind.
    """
    parallel = models.start(settings)
    kinds = _KINDS | (_TRANSFORMER_ENGINE if _has_transformer_engine(settings) else {})
    for name, options in list(kinds.items())[:: len(kinds) - 1 if settings.is_tiny else 1]:
        yield attempt(name, partial(_resume, settings, parallel, {"dtype": torch.bfloat16} | options))


def _has_transformer_engine(settings: Settings) -> bool:
    from megatron.core.models.gpt import gpt_layer_specs

    return settings.is_cuda and gpt_layer_specs.HAVE_TE


def _resume(settings: Settings, parallel: ParallelContext, options: dict[str, Any]) -> tuple[bool, Figures]:
    """Two steps, a checkpoint and a third step, which the resumed run must take too."""
    source = models.trained_checkpoint(settings)
    rows = [list(row) for row in make_prompts(OPTConfig.from_directory(source), 2, 65, seed=1)]
    model, optimizer = training_model(source, parallel, **options)
    for _ in range(2):
        training_step(model, optimizer, rows, parallel.device)
    with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
        checkpoints = CheckpointManager(Path(directory), parallel)
        checkpoints.save(model.module, optimizer, TrainingState(iteration=2))
        checkpoints.finish()
        resumed, its_optimizer = training_model(source, parallel, **options)
        path = checkpoints.directory / "iter_0000002"
        _, same_layout = checkpoints.read_state(path)
        checkpoints.load(path, resumed.module, its_optimizer, same_layout=same_layout)
    are_equal = _are_equal(model, resumed)
    loss, _ = training_step(model, optimizer, rows, parallel.device)
    its_loss, _ = training_step(resumed, its_optimizer, rows, parallel.device)
    return are_equal and loss == its_loss, {"parameters are equal": are_equal, "loss": loss, "resumed": its_loss}


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, its) for mine, its in pairs)
