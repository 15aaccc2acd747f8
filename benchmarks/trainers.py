"""The systems whose training is measured: this project, and the same loop with transformers and torch's AdamW.

Both take the same batch in one piece, without dropout, clip at 1 and step with fused AdamW.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from opt_megatron.config import OPTConfig

from .peer import Setup
from .peers import OptMegatron, Transformers
from .weights import huggingface_directory

Rows = list[list[int]]  # [b][s + 1] token ids: inputs and shifted targets
_LR = 1e-5


class Trainer(Protocol):
    """A system with a model and its optimizer."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import what the system needs."""

    def step(self, rows: Rows) -> tuple[float, float]:
        """One step: seconds, and the loss before it."""


class OptMegatronTrainer:
    """This project's objective and optimizer."""

    RECOMPUTE: str | None = None
    prepare = staticmethod(OptMegatron.prepare)

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
        """As `Trainer.step`."""
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


class RecomputingTrainer(OptMegatronTrainer):
    """With the activations of every layer recomputed."""

    RECOMPUTE = "full"


class TransformersTrainer:
    """transformers' OPT in a plain loop."""

    prepare = staticmethod(Transformers.prepare)

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
        """As `Trainer.step`."""
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


TRAINERS: dict[str, type[Trainer]] = {"opt_megatron": OptMegatronTrainer, "transformers": TransformersTrainer}
RECOMPUTING = "opt_megatron, recomputed"


def training_memory(kind: type[Trainer], setup: Setup, rows: Rows) -> float:
    """MB by which the process's peak of resident memory grows while it trains, from before the model is loaded."""
    from .memory import status

    kind.prepare(setup)
    before = status("VmRSS")
    trainer = kind(setup)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):  # the second step has the optimizer's state as well
        trainer.step(rows)
    return status("VmHWM") - before


def trainer_class(system: str) -> Any:
    """The class for the name of a system."""
    return RecomputingTrainer if system == RECOMPUTING else TRAINERS[system]
