"""A training step of 125m's shape: loss and norm of the gradient against plain torch, time against transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ...measure import alternate, spread
from ...system_protocol import Setup
from ...systems import OURS
from ...training_systems import TRAINING_SYSTEMS
from ...workload import make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..plain_opt import PlainOPT
from ..settings import SMALL, Settings

_ROUNDS = 3
_TOLERANCES = {"float32": (1e-5, 1e-4), "float16": (1e-2, 2e-2), "bfloat16": (1e-2, 2e-2)}  # loss, norm; relative
_FLOPS = 6  # of a parameter and a token: a product in the forward pass, two in the backward pass


def cases(settings: Settings) -> Iterator[Case]:
    """Each dtype."""
    models.start(settings)
    directory = models.make_checkpoint(settings, SMALL)
    for dtype in models.DTYPES:
        yield attempt(dtype, partial(_train, settings, directory, dtype))


def _train(settings: Settings, directory: Path, dtype: str) -> tuple[bool, Figures]:
    batch, length = (2, 32) if settings.is_tiny else (8, 1024)
    rows = [list(row) for row in make_prompts(settings.config(SMALL), batch, length + 1, seed=1)]
    setup = Setup(settings.checkpoint(SMALL), dtype, settings.threads, settings.device)
    names = [name for name in TRAINING_SYSTEMS if name == OURS or models.has_transformers()]
    for name in names:
        TRAINING_SYSTEMS[name].prepare(setup)
    systems = {name: TRAINING_SYSTEMS[name](setup) for name in names}
    own = systems[OURS].step(rows)
    loss, norm = _plain_step(directory, settings.device, dtype, rows)
    figures: Figures = {"loss": own.loss, "plain torch's loss": loss, "norm": own.grad_norm, "plain torch's norm": norm}
    for name in names[1:]:
        systems[name].step(rows)
    runs = {name: lambda _, system=system: {"ms": system.step(rows).seconds * 1e3} for name, system in systems.items()}
    for name, values in alternate(runs, _ROUNDS, 0)["ms"].items():
        figures[f"ms, {name}"] = measured = spread(values)
        work = _FLOPS * settings.config(SMALL).num_parameters * batch * length
        figures[f"TFLOP/s, {name}"] = work / measured["median"] / 1e9
    of_loss, of_norm = _TOLERANCES[dtype]
    passed = math.isclose(own.loss, loss, rel_tol=of_loss) and math.isclose(own.grad_norm, norm, rel_tol=of_norm)
    return passed, figures


def _plain_step(directory: Path, device: str, dtype: str, rows: list[list[int]]) -> tuple[float, float]:
    """Loss, and norm of its gradient."""
    model = PlainOPT(directory, device, getattr(torch, dtype))
    weights = [weight.requires_grad_() for weight in model.weights.values()]
    loss = model.loss(rows)
    loss.backward()
    norms = [weight.grad.float().norm() for weight in weights if weight.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()
