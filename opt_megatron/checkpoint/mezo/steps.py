"""One step of MeZO on a part of a tensor, and the log of a run's steps.

Malladi et al. 2023 (arXiv:2305.17333, algorithm 1), as the authors' code computes it: t are the parameters, e epsilon,
l the learning rate, and z normal numbers that the step's seed determines.

    t += e z        the loss of the batch: loss+
    t -= 2 e z      the loss of the batch: loss-
    t += e z
    t -= l g z      with g = (loss+ - loss-) / (2 e), the projected gradient

Each line is rounded to the parameters' dtype. Whoever has (seed, g, l) of all steps, and e, can repeat them to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from torch import Tensor

_RECORD = np.dtype([("seed", "<u8"), ("projected_gradient", "<f8"), ("lr", "<f8")])


@dataclass(frozen=True)
class MezoStep:
    """What determines a step.

    Attributes:
        seed: of its normal numbers, 64 bits.
        projected_gradient: g; 0 for a step that was not applied.
    """

    seed: int
    projected_gradient: float
    lr: float


def add_multiple(parameters: Tensor, normal: Tensor, factor: float) -> None:
    """t += factor z, in float32 and rounded once to the dtype of `parameters`; both tensors have one shape."""
    parameters.add_(normal * factor)


def restore_and_update(parameters: Tensor, normal: Tensor, epsilon: float, step: MezoStep) -> None:
    """The last two lines of a step."""
    add_multiple(parameters, normal, epsilon)
    add_multiple(parameters, normal, -step.lr * step.projected_gradient)


def repeat_step(parameters: Tensor, normal: Tensor, epsilon: float, step: MezoStep) -> None:
    """All lines of a step that has been made before."""
    add_multiple(parameters, normal, epsilon)
    add_multiple(parameters, normal, -2 * epsilon)
    restore_and_update(parameters, normal, epsilon, step)


def steps_to_bytes(steps: Sequence[MezoStep]) -> bytes:
    """The log: 24 bytes a step, little-endian seed (uint64), projected gradient and learning rate (float64)."""
    return np.array([astuple(step) for step in steps], _RECORD).tobytes()


def steps_from_bytes(content: bytes) -> list[MezoStep]:
    """The steps of a log.

    Raises:
        ValueError: it holds half a step, or numbers that no run writes.
    """
    if len(content) % _RECORD.itemsize:
        raise ValueError(f"has {len(content):,} bytes, which is no multiple of the {_RECORD.itemsize} of a step")
    records = np.frombuffer(content, _RECORD)
    if not (np.isfinite(records["projected_gradient"]).all() and np.isfinite(records["lr"]).all()):
        raise ValueError("holds a projected gradient or a learning rate that is not finite")
    return [MezoStep(*record.tolist()) for record in records]
