"""Jobs with Megatron-core's own GPTModel (local spec) and its dist_checkpointing, for the tests of torch_dist."""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opt_megatron.checkpoint.checkpoint import Checkpoint
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.load import load_weights
from opt_megatron.checkpoint.parameter_mapping import EMBEDDING
from opt_megatron.checkpoint.storage.lazy_tensor import Concatenated, zero_rows
from opt_megatron.model.megatron_config import transformer_config
from opt_megatron.parallel.context import ParallelContext, init_parallel
from opt_megatron.parallel.core_compat import cuda_calls_stay_on_cpu, prepare_training


@dataclass(frozen=True)
class Saving:
    """How core saves: its layout, and its options.

    Attributes:
        fully_parallel: data parallel ranks share the writing.
        metadata: of `sharded_state_dict`.
        padding: rows that are added to the vocabulary.
    """

    tp: int = 1
    pp: int = 1
    fully_parallel: bool = False
    metadata: dict[str, Any] | None = None
    padding: int = 0


def core_model(checkpoint: Checkpoint, parallel: ParallelContext) -> Any:
    """This rank's part of core's GPTModel of a checkpoint's size, not initialised."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    prepare_training(parallel.device)
    config = checkpoint.config
    with cuda_calls_stay_on_cpu(parallel.device):
        return GPTModel(
            transformer_config(config, parallel, getattr(torch, config.dtype), add_qkv_bias=True),
            get_gpt_layer_local_spec(normalization="LayerNorm"),
            vocab_size=checkpoint.tensors[EMBEDDING].shape[0],
            max_sequence_length=config.num_position_rows,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            share_embeddings_and_output_weights=True,
        ).to(getattr(torch, config.dtype))


def save_with_core(source: Path, target: Path, saving: Saving, arguments: argparse.Namespace) -> None:
    """Write an iteration's directory as Megatron-LM does, from core's model with the weights of `source`."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    parallel = init_parallel(saving.tp, saving.pp, seed=1)
    checkpoint = open_checkpoint(source)
    if saving.padding:
        rows = checkpoint.tensors[EMBEDDING]
        checkpoint.tensors[EMBEDDING] = Concatenated([rows, zero_rows(saving.padding, rows)], 0)
    model = core_model(checkpoint, parallel)
    load_weights(model, checkpoint, parallel)
    if parallel.is_leader:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    if saving.fully_parallel:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group())
    state = {"model": model.sharded_state_dict(metadata=saving.metadata)}
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # core's writer forks
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 500}
    dist_checkpointing.save(state | common, str(target), strategy)


def load_with_core(directory: Path, tp: int, pp: int) -> list[str]:
    """Load a checkpoint by core's own means; the names of the parameters that are not as this project reads them."""
    from megatron.core import dist_checkpointing

    parallel = init_parallel(tp, pp, seed=1)
    checkpoint = open_checkpoint(directory)
    model, expected = core_model(checkpoint, parallel), core_model(checkpoint, parallel)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))
    model.load_state_dict(loaded["model"])
    load_weights(expected, checkpoint, parallel)
    pairs = zip(model.named_parameters(), expected.parameters(), strict=True)
    return [name for (name, left), right in pairs if not torch.equal(left, right)]
