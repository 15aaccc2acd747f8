"""A case: one thing that a section checks or measures."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]  # by name with its unit; for the JSON
_MOST_DIFFERENCE = 1e-3  # of a log-probability or an activation in float32; ids are whole numbers
_MOST_FRAMES, _MOST_CHARACTERS = 4, 600


@dataclass(frozen=True)
class Case:
    """What came of it.

    Attributes:
        passed: None where something was measured and nothing claimed.
        figures: what was measured.
        error: why it has no more figures; it did not pass then.
    """

    name: str
    passed: bool | None = None
    figures: Figures = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The attributes by name, without an empty error."""
        return {name: value for name, value in asdict(self).items() if name != "error" or value}


def attempt(name: str, measure: Callable[[], tuple[bool | None, Figures]]) -> Case:
    """The case that `measure` makes: whether it passed, and its figures. One that raises has failed."""
    try:
        passed, figures = measure()
        return Case(name, passed, figures)
    except Exception as error:
        return Case(name, False, error=_describe(error))
    finally:
        _free_memory()


def compared(own: Case, expected: Case | None) -> Case:
    """The case of a GPU's numbers (`values` of its figures), given the CPU's."""
    if own.error or "values" not in own.figures:
        return own
    if expected is None or expected.error:
        return Case(own.name, False, error=f"on the CPU: {expected.error if expected else 'it was not computed'}")
    numbers, wanted = own.figures["values"], expected.figures["values"]
    differences = [abs(one - other) for one, other in zip(numbers, wanted, strict=False)]
    passed = len(numbers) == len(wanted) and all(difference < _MOST_DIFFERENCE for difference in differences)  # no NaN
    return Case(own.name, passed, {"numbers": len(numbers), "largest difference": max(differences, default=0.0)})


def _describe(error: Exception) -> str:
    """Type, message, and the last lines of the code that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    lines = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS] + f" ({lines})"


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
