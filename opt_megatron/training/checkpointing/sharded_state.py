"""The state of a run for dist_checkpointing: sharded tensors of model and optimizer, random states, an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...config import dtype_name
from ...parallel.context import ParallelContext
from ..optimizer import TrainingOptimizer

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def sharded_state(
    model: MegatronModule,
    optimizer: TrainingOptimizer,
    parallel: ParallelContext,
    *,
    is_loading: bool,
    with_random_state: bool = True,
) -> dict[str, Any]:
    """This rank's part of the state, under the keys `model`, `optimizer` and `random_state`.

    Args:
        model: without the DistributedDataParallel around it.
        is_loading: allocate the optimizer's tensors if no step has been made yet.
        with_random_state: random states belong to one layout, and are left out when another one is read.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    model_state = model.sharded_state_dict()
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading)
    state = {"model": model_state, "optimizer": optimizer_state}
    if with_random_state:
        position = (
            parallel.pipeline_model_parallel_rank,
            parallel.tensor_model_parallel_rank,
            parallel.data_parallel_rank,
        )
        state["random_state"] = ShardedObject("random_state", _random_state(), layout_of(parallel), position)
    return state


def layout_of(parallel: ParallelContext) -> tuple[int, int, int]:
    """(pipeline, tensor, data) parallel sizes."""
    return (
        parallel.pipeline_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.data_parallel_size,
    )


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the random states of this rank to what `sharded_state` saved."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def tensor_index(path: Path) -> dict[str, Any]:
    """Where each shard of each of the model's tensors is, for checkpoint/formats/torch_dist.py."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path).read_metadata()  # a pickle, but written by this process
    storage = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    index: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or name.startswith("optimizer."):
            continue
        chunks = []
        for chunk in tensor.chunks:
            info = storage[name, tuple(chunk.offsets)]
            chunks.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": info.relative_path,
                    "start": info.offset,
                    "length": info.length,
                }
            )
        index[name] = {"shape": list(tensor.size), "dtype": dtype_name(tensor.properties.dtype), "chunks": chunks}
    return index
