"""Times that include the GPU's work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from .settings import Settings

_SHORT = 2  # tokens of the run whose time is subtracted


class Timer:
    """Measures on one device."""

    def __init__(self, settings: Settings) -> None:
        self._is_cuda = settings.is_cuda

    def seconds(self, action: Callable[[], Any]) -> float:
        """Of one call."""
        self._synchronize()
        start = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - start

    def milliseconds_a_step(self, generate: Callable[[int], Any], count: int) -> float:
        """From the difference of two lengths, so that the prompts do not count."""
        long, short = (self.seconds(partial(generate, length)) for length in (count, _SHORT))
        return 1e3 * (long - short) / (count - _SHORT)

    def _synchronize(self) -> None:
        if self._is_cuda:
            import torch

            torch.cuda.synchronize()
