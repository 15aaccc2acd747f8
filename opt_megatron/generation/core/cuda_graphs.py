"""CUDA graphs: the kernels of a function, recorded once and launched together.

Not yet run on a GPU; on the simulated one of the tests, steps are captured and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class CudaGraphs:
    """Graphs of functions that read and write the same memory whenever they are called, and return a tensor in it.

    All graphs share the memory of what they compute in between, since no two of them run at the same time.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._known: set[Hashable] = set()

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Call the function, or replay its graph.

        Args:
            key: of the function. The first call runs it as it is, so that libraries can prepare themselves; the
                second one captures it.
        """
        if key not in self._known:
            self._known.add(key)
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(self, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function()
        return graph, output
