"""The interface of a measured system: what it is started with, and its methods. The implementations are in systems/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .static_batching import ServingResult, Tokens
from .workload import PromptTokens, WorkloadRequest


@dataclass(frozen=True)
class Setup:
    """What a system is started with.

    Attributes:
        model: the directory that `weights.make_model` filled.
        dtype: float32, int8, bfloat16 or float16.
        threads: of each process.
        cache_limit: bytes for the keys and values of all running requests; None: no limit.
        ranks: tensor parallel size; each rank is a process, and `rank` is this one's number.
        store: the file of torch.distributed's rendezvous.
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
class GenerateResult:
    """One call to generate.

    Attributes:
        seconds: the whole call.
        steps: seconds from its start until each step's tokens were available.
        tokens: each prompt's new tokens.
    """

    seconds: float
    steps: list[float]
    tokens: list[Tokens]

    @property
    def milliseconds_a_step(self) -> float:
        """From the first step's tokens to the last's."""
        return (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1) * 1e3


class System(Protocol):
    """A system that has loaded a model."""

    def __init__(self, setup: Setup) -> None:
        """Load the model."""

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import what the system needs, so that this does not count as its model's memory."""

    def generate(self, prompts: list[PromptTokens], new_tokens: int) -> GenerateResult:
        """Continue equally long prompts as one batch."""

    def tune(self, requests: list[WorkloadRequest]) -> dict[str, float]:
        """Find the system's best parameters for `serve`, and keep them: seconds by name; {} if it has none."""

    def serve(self, requests: list[WorkloadRequest], arrivals: list[float]) -> ServingResult:
        """Serve requests; `arrivals` are seconds after the call."""
