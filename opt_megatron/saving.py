"""Writes a model's weights as a checkpoint, from any layout, with the writer of `opt-megatron convert`.

The leader writes. It reads one tensor after the other, each of which all ranks gather, so that no rank holds more than
one whole tensor.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.conversion_options import ConversionOptions
from .checkpoint.convert import convert
from .checkpoint.storage.blocks import Block
from .checkpoint.storage.lazy_tensor import LazyTensor
from .errors import UserError
from .parallel.command_loop import CommandLoop
from .parallel.context import ParallelContext, on_all_ranks
from .pretrained import Pretrained
from .weights import Weights


def save_weights(
    weights: Weights, pretrained: Pretrained, directory: Path, options: ConversionOptions, *, force: bool
) -> None:
    """Write all weights, the config and the tokenizer; called on every rank.

    Raises:
        UserError: the weights are quantised, the model does not divide by the options' sizes, or the directory cannot
            be written; the same one on every rank.
    """
    parallel, source = pretrained.parallel, pretrained.checkpoint
    if source is None:
        raise UserError(f"{pretrained.name} was not opened from a checkpoint, whose tokenizer is saved with it")
    weights.check_all_float()
    gathering = _Gathering(weights, parallel)

    def write() -> None:
        checkpoint = Checkpoint(source.path, "OPT", pretrained.config, gathering.lazy_tensors())
        with gathering.commands.leading():
            convert(checkpoint, directory, options, tokenizer=pretrained.tokenizer_directory, force=force, workers=1)

    on_all_ranks(parallel, write if parallel.is_leader else gathering.commands.follow)


class _Gathering:
    """Gathers whole tensors for the leader, on all ranks.

    Attributes:
        commands: a command is the index of a weight.
    """

    def __init__(self, weights: Weights, parallel: ParallelContext) -> None:
        self.commands = CommandLoop(parallel, lambda index, _: self._gather(index))
        self._weights = weights
        self._names = list(weights)
        self._name: str | None = None
        self._tensor: Tensor | None = None

    def lazy_tensors(self) -> dict[str, LazyTensor]:
        """On the leader: every weight, to be read tensor by tensor in one thread."""
        return {name: _GatheredTensor(self, name, self._weights) for name in self._weights}

    def read(self, name: str) -> Tensor:
        """On the leader: the whole tensor on the CPU, gathered unless it was the latest one."""
        if self._tensor is None or self._name != name:
            self._tensor = None  # freed before the next one is made
            index = self._names.index(name)
            self.commands.send(index)
            self._name, self._tensor = name, self._gather(index).cpu()
        return self._tensor

    def _gather(self, index: int) -> Tensor:
        """On every rank: the whole tensor."""
        return self._weights[self._names[index]]


class _GatheredTensor(LazyTensor):
    """A weight that is gathered when it is read."""

    def __init__(self, gathering: _Gathering, name: str, weights: Weights) -> None:
        super().__init__(weights.shape(name), weights.dtype)
        self._gathering, self._name = gathering, name

    def read(self, block: Block) -> Tensor:
        """A view of the whole tensor."""
        return self._gathering.read(self._name)[block]
