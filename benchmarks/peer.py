"""What all measured systems have in common: how they are started, and what they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .serving import Served, Tokens
from .workload import Prompt, ServedRequest


@dataclass(frozen=True)
class Setup:
    """What a system is started with.

    Attributes:
        model: the directory that `weights.make_model` filled.
        dtype: float32, int8, bfloat16 or float16.
        threads: of each process.
        cache_limit: bytes that the keys and values of all that runs may take; None: no limit.
        ranks: tensor parallel size; each rank is a process, and `rank` is this one's number.
        store: a file in which the ranks find each other.
    """

    model: Path
    dtype: str
    threads: int
    device: str = "cpu"
    cache_limit: int | None = None
    ranks: int = 1
    rank: int = 0
    store: Path | None = None


@dataclass(frozen=True)
class Run:
    """One call to generate.

    Attributes:
        seconds: the whole call.
        steps: seconds from its start until each step's tokens were there.
        tokens: each prompt's new tokens.
    """

    seconds: float
    steps: list[float]
    tokens: list[Tokens]


class Peer(Protocol):
    """A system with a model."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import what the system needs, so that this does not count as its model's memory."""

    def generate(self, prompts: list[Prompt], new_tokens: int) -> Run:
        """Continue equally long prompts as one batch."""

    def tune(self, requests: list[ServedRequest]) -> dict[str, float]:
        """Find the system's best setting for `serve`: seconds by setting, the best one kept; {} with none to try."""

    def serve(self, requests: list[ServedRequest], arrivals: list[float]) -> Served:
        """Serve requests that arrive at these seconds."""
