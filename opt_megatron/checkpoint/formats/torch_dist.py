"""The checkpoints of training: megatron-core's dist_checkpointing (torch_dist), with an index in JSON. Only read.

    DIR/iter_0000200/  config.json  tensors.json  __0_0.distcp ...     (DIR: its newest iteration is read)

A .distcp file is a sequence of torch.save files, one for each shard of a tensor. `torch_dist_shards.py` says how
the index names them. LoRA's factors (`lora_a`, `lora_b`, and lora.json) are added to their weights as they are read.
"""

from __future__ import annotations

from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError
from ..adapter import add_adapter
from ..checkpoint import Checkpoint
from ..parameter_mapping import stage_parameters
from ..storage.lazy_tensor import LazyTensor
from .format import Format
from .infer_config import directory_config
from .lora_run import LORA_FILE, run_adapter
from .megatron_ranks import iteration_directories
from .megatron_tensors import qkv_component
from .torch_dist_shards import INDEX_FILE, ShardedTensors


class TorchDistFormat(Format):
    """The newest iteration of a training run, or one iteration, as megatron-core's dist_checkpointing writes it."""

    title = "torch_dist"
    detection_rank = 10  # before Megatron's: a training run has Megatron-LM's tracker file too
    file_names = r"iter_\d+"

    def detect(self, directory: Path) -> bool:
        """Whether the directory is a training run's, or one of its checkpoints."""
        return _newest(directory) is not None

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a checkpoint, or the newest of a run, lazily.

        Raises:
            CheckpointError: the index or a file is missing or damaged.
        """
        path = _newest(path) or path
        config = config or directory_config(path)
        if config is None:
            raise CheckpointError(f"{path}: there is no config.json; put the model's there")
        stored = ShardedTensors(path)
        tensors: dict[str, LazyTensor] = {}
        for parameter in stage_parameters(config, range(config.num_layers), first=True, last=True):
            weight = stored.find(parameter.megatron)
            if weight is None:
                continue  # named by Checkpoint.check_tensors
            count = len(parameter.canonical)
            for index, name in enumerate(parameter.canonical):
                tensors[name] = weight if count == 1 else qkv_component(weight, index, count, config.head_dim)
        checkpoint = Checkpoint(path, f"training checkpoint {path.name}", config, tensors)
        if (path / LORA_FILE).is_file():
            return add_adapter(checkpoint, run_adapter(path, config, stored.find))
        return checkpoint


FORMAT = TorchDistFormat()


def _newest(directory: Path) -> Path | None:
    """The directory itself if it is a checkpoint, or the run's checkpoint with the highest iteration."""
    if (directory / INDEX_FILE).is_file():
        return directory
    return next((path for _, path in iteration_directories(directory) if (path / INDEX_FILE).is_file()), None)
