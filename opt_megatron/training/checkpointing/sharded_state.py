"""The state of a run for dist_checkpointing: sharded tensors of model and optimizer, random states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...model.parameter_names import TRANSFORMER_ENGINE_NAMES
from ...parallel.context import ParallelContext
from ..optimizer import TrainingOptimizer

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

_LAYERS = "decoder.layers."
# The layers' norms in runs that were saved before core's local spec could load them.
_OLD_NAMES = {f"{_LAYERS}{name}": f"{_LAYERS}{old}" for old, name in TRANSFORMER_ENGINE_NAMES.items()}


def has_old_names(path: Path) -> bool:
    """Whether a checkpoint names the layers' norms as they are called in the model, as runs did at first."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    return f"{_LAYERS}input_layernorm.weight" in load_tensors_metadata(str(path))


def sharded_state(
    model: MegatronModule,
    optimizer: TrainingOptimizer,
    parallel: ParallelContext,
    *,
    is_loading: bool,
    with_random_state: bool = True,
    norms_by_old_names: bool = False,
) -> dict[str, Any]:
    """This rank's part of the state, under the keys `model`, `optimizer` and `random_state`.

    Args:
        model: without the DistributedDataParallel around it.
        is_loading: allocate the optimizer's tensors if no step has been made yet.
        with_random_state: random states belong to one layout, and are left out when another one is read.
        norms_by_old_names: as `has_old_names` found them.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

    model_state = model.sharded_state_dict()
    if norms_by_old_names:
        apply_prefix_mapping(model_state, _OLD_NAMES)
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading)
    state = {"model": model_state, "optimizer": optimizer_state}
    if with_random_state:
        position = (
            parallel.pipeline_model_parallel_rank,
            parallel.tensor_model_parallel_rank,
            parallel.data_parallel_rank,
        )
        state["random_state"] = ShardedObject(
            "random_state", _random_state(parallel.device), layout_of(parallel), position
        )
    return state


def layout_of(parallel: ParallelContext) -> tuple[int, int, int]:
    """(pipeline, tensor, data) parallel sizes."""
    return (
        parallel.pipeline_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.data_parallel_size,
    )


def _random_state(device: torch.device) -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the random states of this rank, which computes on `device`, to what `sharded_state` saved."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
