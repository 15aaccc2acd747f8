"""A run of `train --optimizer mezo`: the checkpoint that it began with, and the log of the steps made from there.

    DIR/iter_0000200/  mezo.json  mezo_steps.bin         `checkpoint/mezo/run_files.py`
                       config.json                       and the tokenizer's files
                       lora.json                         where the run trains LoRA's factors
    DIR/latest_checkpointed_iteration.txt                which iteration DIR means

The weights are the base's, on which the steps are repeated as they are read; LoRA's factors begin with the values that
the run's seed gives them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...config import OPTConfig
from ...errors import CheckpointError
from ...model.initial_values import initial_lora_a
from ..adapter import add_adapter
from ..checkpoint import Checkpoint
from ..checkpoint_facts import facts_digest
from ..locate import locate
from ..mezo.run_files import RUN_FILE, MezoRun, read_run
from ..mezo.steps import MezoStep
from ..mezo.trained_tensor import TrainedTensor
from ..parameter_mapping import canonical_shapes, stage_parameters
from ..storage.blocks import Block, block_shape, whole
from ..storage.lazy_tensor import LazyTensor
from .format import Format
from .infer_config import directory_config
from .lora_run import LORA_FILE, read_lora_layers, run_adapter
from .megatron_ranks import find_iteration
from .registry import open_checkpoint


class MezoRunFormat(Format):
    """One iteration, or the one of a run's directory that its tracker names."""

    title = "MeZO run"
    detection_rank = 5  # before torch_dist's and Megatron's: the directory of a run has their tracker file

    def detect(self, directory: Path) -> bool:
        """Whether the directory is an iteration's, or holds one."""
        return find_iteration(directory, _is_iteration) is not None

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open the base lazily, with the steps to repeat on it.

        Raises:
            CheckpointError: a file is missing or damaged, or the base is not there or has changed.
        """
        directory = find_iteration(path, _is_iteration) or path
        run, steps, _ = read_run(directory)
        base = _open_base(run, directory)
        config = config or directory_config(directory)
        if config is None:
            raise CheckpointError(f"{directory}: has no config.json")
        has_lora = (directory / LORA_FILE).is_file()
        dtype = getattr(torch, run.dtype)
        tensors: dict[str, LazyTensor] = {
            name: TrainedTensor(name, tensor, dtype, () if has_lora else steps, run.epsilon)
            for name, tensor in base.tensors.items()
        }
        description = f"MeZO run {directory.name} on {base.format_description}"
        checkpoint = Checkpoint(directory, description, config, tensors, base=base.path)
        if not has_lora:
            return checkpoint
        factors = _trained_factors(directory, config, run, steps)
        return add_adapter(checkpoint, run_adapter(directory, config, factors))


FORMAT = MezoRunFormat()


def _is_iteration(directory: Path) -> bool:
    return (directory / RUN_FILE).is_file()


def _open_base(run: MezoRun, directory: Path) -> Checkpoint:
    try:
        base = open_checkpoint(locate(run.base, run.revision))
    except CheckpointError as error:
        raise CheckpointError(
            f'{directory}: its base cannot be opened ({error}); if it has moved, change "base" in {RUN_FILE}'
        ) from None
    if facts_digest(base) != run.base_digest:
        raise CheckpointError(f"{directory}: its base, {base.path}, is another model than when the run began")
    return base


def _trained_factors(directory: Path, config: OPTConfig, run: MezoRun, steps: list[MezoStep]) -> dict[str, LazyTensor]:
    """LoRA's factors under the names that a training run's checkpoint stores them by."""
    _, layers = read_lora_layers(directory / LORA_FILE, config)
    shapes, dtype = canonical_shapes(config), getattr(torch, run.dtype)
    factors: dict[str, LazyTensor] = {}
    for parameter in stage_parameters(config, range(config.num_layers), first=True, last=True):
        module, _, kind = parameter.megatron.rpartition(".")
        if module in layers and kind == "weight":
            rank = layers[module].rank
            outputs, inputs = sum(shapes[name][0] for name in parameter.canonical), shapes[parameter.canonical[0]][1]
            first = {"lora_a": _InitialA(module, (rank, inputs), run.seed), "lora_b": _Zeros((outputs, rank), dtype)}
            for kind, tensor in first.items():
                name = f"{module}.{kind}"
                factors[name] = _KeptTensor(TrainedTensor(name, tensor, dtype, steps, run.epsilon))
    return factors


class _InitialA(LazyTensor):
    """The first A of a layer, in float32."""

    def __init__(self, module: str, shape: tuple[int, int], seed: int) -> None:
        super().__init__(shape, torch.float32)
        self._module, self._seed = module, seed

    def read(self, block: Block) -> Tensor:
        """A view of the whole tensor, which is made for it."""
        return initial_lora_a(self._module, (self.shape[0], self.shape[1]), self._seed)[block]


class _Zeros(LazyTensor):
    """The first B of a layer."""

    def read(self, block: Block) -> Tensor:
        """A new tensor."""
        return torch.zeros(block_shape(block), dtype=self.dtype)


class _KeptTensor(LazyTensor):
    """A small tensor that is read once: every block of a weight needs all of a factor."""

    def __init__(self, tensor: LazyTensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self._tensor = tensor

    @cached_property
    def _values(self) -> Tensor:
        return self._tensor.read(whole(self.shape))

    def read(self, block: Block) -> Tensor:
        """A view of the whole tensor."""
        return self._values[block]
