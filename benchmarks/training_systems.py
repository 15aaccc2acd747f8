"""The systems whose training is measured: this project, and the same loop with transformers and torch's AdamW.

Both train on the same batch in one piece, without dropout, clip gradients at norm 1 and step with fused AdamW.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from opt_megatron.config import OPTConfig

from .system_protocol import Setup
from .systems import OptMegatron, Transformers
from .weights import huggingface_directory

Rows = list[list[int]]  # [b][s + 1] token ids: inputs and shifted targets
_LR = 1e-5


class TrainingSystem(Protocol):
    """A system with a model and its optimizer."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import what the system needs."""

    def step(self, rows: Rows) -> tuple[float, float]:
        """One step: seconds, and the loss before it."""


class OptMegatronTraining:
    """This project's objective and optimizer."""

    RECOMPUTE: str | None = None

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import torch and Megatron-core, and start the process group."""
        OptMegatron.prepare(setup)

    def __init__(self, setup: Setup) -> None:
        import torch

        from opt_megatron.parallel.context import init_parallel
        from opt_megatron.training.lr_schedule import LRSchedule
        from opt_megatron.training.model_setup import setup_model_and_optimizer
        from opt_megatron.training.options import TrainerOptions
        from opt_megatron.training.training_options import TrainingOptions

        self._parallel = init_parallel(1, 1, seed=1, device=setup.device)
        directory = huggingface_directory(setup.model)
        options = TrainingOptions(
            config=OPTConfig.from_directory(directory).replace(dropout=0.0, attention_dropout=0.0),
            schedule=LRSchedule(_LR, _LR, 0, 1),
            trainer=TrainerOptions(1, 1, 1, 1),
            load=str(directory),
            dtype=getattr(torch, setup.dtype),
            recompute_granularity=self.RECOMPUTE,
        )
        self._model, self._optimizer = setup_model_and_optimizer(options, self._parallel)
        self._model.train()

    def step(self, rows: Rows) -> tuple[float, float]:
        """See `TrainingSystem.step`; all rows are one batch."""
        import torch

        from opt_megatron.training.loss import forward_backward

        start = time.perf_counter()
        tokens = torch.tensor(rows)
        shape = tokens[:, 1:].shape
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        sums = forward_backward(self._model, [batch], self._parallel.device)
        self._optimizer.step(_LR)
        loss = float(sums.total / sums.tokens)
        return time.perf_counter() - start, loss


class RecomputingTraining(OptMegatronTraining):
    """This project, with the activations of every layer recomputed in the backward pass."""

    RECOMPUTE = "full"


class TransformersTraining:
    """transformers' OPT in a plain loop."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import torch and transformers."""
        Transformers.prepare(setup)

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import OPTForCausalLM

        directory = huggingface_directory(setup.model)
        self._device = setup.device
        self._model = OPTForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, setup.dtype), dropout=0.0, attention_dropout=0.0
        )
        self._model = self._model.train().to(setup.device)
        decayed = [p for p in self._model.parameters() if p.dim() > 1]
        others = [p for p in self._model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=_LR, betas=(0.9, 0.95), fused=True)

    def step(self, rows: Rows) -> tuple[float, float]:
        """See `TrainingSystem.step`; all rows are one batch."""
        import torch
        from torch.nn.functional import cross_entropy

        start = time.perf_counter()
        tokens = torch.tensor(rows, device=self._device)
        self._adam.zero_grad()
        logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._adam.step()
        return time.perf_counter() - start, float(loss.detach())


TRAINING_SYSTEMS: dict[str, type[TrainingSystem]] = {
    "opt_megatron": OptMegatronTraining,
    "transformers": TransformersTraining,
}
RECOMPUTING = "opt_megatron, recomputed"


def training_memory(kind: type[TrainingSystem], setup: Setup, rows: Rows) -> float:
    """MB by which the process's peak of resident memory grows while it trains, from before the model is loaded."""
    from .peak_memory import known_status

    kind.prepare(setup)
    before = known_status("VmRSS")
    trainer = kind(setup)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):  # the second step has the optimizer's state as well
        trainer.step(rows)
    return known_status("VmHWM") - before


def training_system_class(system: str) -> Any:
    """The class for the name of a system."""
    return RecomputingTraining if system == RECOMPUTING else TRAINING_SYSTEMS[system]
