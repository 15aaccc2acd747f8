"""CUDA graphs: the device's operations, recorded once and repeated on the memory that they had."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from .traffic import Counts, capturing, launch


@dataclass(frozen=True)
class _Operation:
    """One that was recorded: replaying it writes into the memory of its first result."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    result: Any

    def replay(self) -> None:
        again = self.function(*self.args, **self.kwargs)
        for old, new in zip(tree_leaves(self.result), tree_leaves(again), strict=True):
            if isinstance(new, torch.ScriptObject):  # a collective's work
                dist.distributed_c10d.Work.unbox(new).wait()
            elif isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                old.copy_(new)


class CudaGraph:
    """What takes the place of `torch.cuda.CUDAGraph`.

    Attributes:
        counts: of the capture, of which the operations on the host are repeated by no replay.
        num_replays: how often it was replayed.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.counts, self.num_replays = Counts(), 0
        self._operations: list[_Operation] = []
        self._changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._capture = ExitStack()

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Record the device's operations from here on."""
        self.counts = self._capture.enter_context(capturing())
        captured.append(self)
        _recording.append(self)

    def capture_end(self) -> None:
        """Record no more, and undo what the operations changed: a GPU only notes them."""
        _recording.remove(self)
        self._capture.close()
        with no_dispatch():
            for memory, before in self._changed.values():
                memory.copy_(before)
        self._changed.clear()

    def replay(self) -> None:
        """Repeat the operations."""
        self.num_replays += 1
        launch("graph")
        with no_dispatch():
            for operation in self._operations:
                operation.replay()

    def pool(self) -> tuple[int, int]:
        """Of memory, which graphs may share."""
        return (0, 0)

    def reset(self) -> None:
        """Forget what was recorded."""
        self._operations.clear()

    def _run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], written: list) -> Any:
        for tensor in written:
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._changed.setdefault(memory.data_ptr(), (memory, memory.clone()))
        result = function(*args, **kwargs)
        self._operations.append(_Operation(function, args, kwargs, result))
        return result


captured: list[CudaGraph] = []
_recording: list[CudaGraph] = []


def run(function: Any, args: tuple, kwargs: dict[str, Any], written: list[torch.Tensor] | None = None) -> Any:
    """Call an operation on CPU tensors, and record it where a graph is captured.

    Args:
        written: tensors that it changes; those of its schema unless given.
    """
    if not _recording:
        return function(*args, **kwargs)
    if written is None:
        written = _written(function, args, kwargs)
    with no_dispatch():
        return _recording[-1]._run(function, args, kwargs, written)


def _written(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for number, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
