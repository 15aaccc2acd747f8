"""The files of a MeZO run's checkpoint: what it began with, and the log of its steps.

    mezo.json        {"base": "facebook/opt-125m", "revision": null, "base_digest": "...",
                      "dtype": "float32", "epsilon": 0.001, "seed": 1, "training": {...}}
    mezo_steps.bin   24 bytes a step (`steps.py`)

`base_digest` is that of the base's config and sampled values: a base that has changed since is refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config import BYTES_OF_DTYPE
from ...errors import CheckpointError
from ...files import read_bounded, read_text
from .steps import MezoStep, steps_from_bytes, steps_to_bytes

RUN_FILE = "mezo.json"
STEPS_FILE = "mezo_steps.bin"
_MOST_LOG_BYTES = 2**30


@dataclass(frozen=True)
class MezoRun:
    """What a run's steps are repeated from.

    Attributes:
        base: path, or name of the repository, of the checkpoint that it began with.
        base_digest: `checkpoint_facts.facts_digest` of it.
        dtype: of the parameters.
        epsilon: size of the perturbations.
        seed: of the run; LoRA's first factors are made of it.
    """

    base: str
    revision: str | None
    base_digest: str
    dtype: str
    epsilon: float
    seed: int

    def __post_init__(self) -> None:
        is_valid = (
            all(isinstance(text, str) for text in (self.base, self.base_digest, self.dtype))
            and (self.revision is None or isinstance(self.revision, str))
            and self.dtype in BYTES_OF_DTYPE
            and math.isfinite(self.epsilon)
            and type(self.seed) is int
        )
        if not is_valid:
            raise ValueError(f"{str(self)[:200]} is not what a run writes")


def run_files(run: MezoRun, steps: list[MezoStep], training: dict[str, Any]) -> dict[str, bytes]:
    """Name -> content of the two files.

    Args:
        training: what the run is resumed with, for JSON.
    """
    text = json.dumps(asdict(run) | {"training": training}, indent=1) + "\n"
    return {RUN_FILE: text.encode(), STEPS_FILE: steps_to_bytes(steps)}


def read_run(directory: Path) -> tuple[MezoRun, list[MezoStep], dict[str, Any]]:
    """The run, its steps, and what it is resumed with.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        values = json.loads(read_text(directory / RUN_FILE))
        training = values.pop("training")
        run = MezoRun(**values)
        steps = steps_from_bytes(read_bounded(directory / STEPS_FILE, _MOST_LOG_BYTES))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: is no whole checkpoint of MeZO: {str(error)[:300]}") from None
    if not isinstance(training, dict) or training.get("iteration") != len(steps):
        raise CheckpointError(f"{directory}: {STEPS_FILE} holds {len(steps)} steps, and {RUN_FILE} says another number")
    return run, steps, training
