"""The systems whose training is measured: this project, and the same loop with transformers and torch's AdamW.

Both train on the same batch in one piece, without dropout, clip gradients at norm 1 and step with fused AdamW.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opt_megatron.config import OPTConfig

from .system_protocol import Setup
from .systems import OptMegatron, Transformers
from .weights import huggingface_directory

if TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallel

    from opt_megatron.parallel.context import ParallelContext
    from opt_megatron.training.optimizer import TrainingOptimizer

Rows = list[list[int]]  # [b][s + 1] token ids: inputs and shifted targets
_LR = 1e-5


class StepResult(NamedTuple):
    """A step: its time, the loss of a token before it (nats), and the norm of the gradient before it is clipped."""

    seconds: float
    loss: float
    grad_norm: float


class TrainingSystem(Protocol):
    """A system with a model and its optimizer."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import what the system needs."""

    def step(self, rows: Rows) -> StepResult:
        """One step."""


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

        self._parallel = init_parallel(1, 1, seed=1, device=setup.device)
        self._model, self._optimizer = training_model(
            huggingface_directory(setup.model),
            self._parallel,
            dtype=getattr(torch, setup.dtype),
            recompute_granularity=self.RECOMPUTE,
        )

    def step(self, rows: Rows) -> StepResult:
        """See `TrainingSystem.step`; all rows are one batch."""
        start = time.perf_counter()
        loss, grad_norm = training_step(self._model, self._optimizer, rows, self._parallel.device)
        return StepResult(time.perf_counter() - start, loss, grad_norm)


def training_model(
    directory: Path, parallel: ParallelContext, **options: Any
) -> tuple[DistributedDataParallel, TrainingOptimizer]:
    """The model of a checkpoint without dropout, and its optimizer; `options` are more of `TrainingOptions`."""
    from opt_megatron.training.lr_schedule import LRSchedule
    from opt_megatron.training.model_setup import setup_model_and_optimizer
    from opt_megatron.training.options import TrainerOptions
    from opt_megatron.training.training_options import TrainingOptions

    defaults: dict[str, Any] = {
        "config": OPTConfig.from_directory(directory).replace(dropout=0.0, attention_dropout=0.0),
        "schedule": LRSchedule(_LR, _LR, 0, 1),
        "trainer": TrainerOptions(1, 1, 1, 1),
        "load": str(directory),
    }
    model, optimizer = setup_model_and_optimizer(TrainingOptions(**(defaults | options)), parallel)
    model.train()
    return model, optimizer


def training_step(
    model: DistributedDataParallel, optimizer: TrainingOptimizer, rows: Rows, device: torch.device
) -> tuple[float, float]:
    """One step on a batch: the loss of a token before it, in nats, and the gradient's norm."""
    import torch

    from opt_megatron.training.loss import forward_backward

    tokens = torch.tensor(rows)
    shape = tokens[:, 1:].shape
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).expand(shape),
    }
    model.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(model, [batch], device)
    outcome = optimizer.step(_LR)
    return float(sums.total / sums.tokens), float(outcome.grad_norm)


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

    def step(self, rows: Rows) -> StepResult:
        """See `TrainingSystem.step`; all rows are one batch."""
        import torch
        from torch.nn.functional import cross_entropy

        start = time.perf_counter()
        tokens = torch.tensor(rows, device=self._device)
        self._adam.zero_grad()
        logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._adam.step()
        values = float(loss.detach()), float(norm)  # these wait for a GPU
        return StepResult(time.perf_counter() - start, *values)


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
