"""Checks of a tensor x pipeline layout against a model and the number of processes.

Imports no torch, so that a wrong layout is reported at once.
"""

from __future__ import annotations

import os

from ..config import OPTConfig
from ..errors import UserError


def tensor_parallel_sizes(config: OPTConfig) -> list[int]:
    """The sizes that divide the heads and the MLP. (The vocabulary is padded where it does not divide.)"""
    sizes = (config.num_attention_heads, config.ffn_hidden_size)
    return [n for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes)]


def check_sizes(tensor_model_parallel_size: int, pipeline_model_parallel_size: int) -> None:
    """Raise UserError unless both sizes are at least 1."""
    if tensor_model_parallel_size < 1 or pipeline_model_parallel_size < 1:
        sizes = f"{tensor_model_parallel_size} x {pipeline_model_parallel_size}"
        raise UserError(f"tensor x pipeline parallel size is {sizes}; both must be at least 1")


def check_model_divides(config: OPTConfig, tensor_model_parallel_size: int, pipeline_model_parallel_size: int) -> None:
    """Raise UserError, in one line with the numbers, unless the model divides by the layout."""
    check_sizes(tensor_model_parallel_size, pipeline_model_parallel_size)
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    for size, what in (
        (config.num_attention_heads, "attention heads"),
        (config.ffn_hidden_size, "ffn_hidden_size"),
    ):
        if size % tp:
            fitting = ", ".join(map(str, tensor_parallel_sizes(config)))
            raise UserError(
                f"tensor parallel size {tp} does not divide the model's {size} {what}: use one of {fitting}"
            )
    if config.num_layers % pp:
        fitting = ", ".join(str(n) for n in range(1, config.num_layers + 1) if config.num_layers % n == 0)
        raise UserError(
            f"pipeline parallel size {pp} does not divide the model's {config.num_layers} layers: use one of {fitting}"
        )


def check_layout(
    config: OPTConfig | None,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    world_size: int,
    *,
    data_parallel: bool = True,
) -> None:
    """Check that the sizes fit the number of processes and, with a config, the model.

    Raises:
        UserError: one line with the numbers. With `data_parallel=False` the processes must be exactly
            tensor x pipeline; otherwise what remains of the world is data parallel.
    """
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    check_sizes(tp, pp)
    _check_world(tp, pp, world_size, data_parallel)
    if config is not None:
        check_model_divides(config, tp, pp)


def _check_world(tp: int, pp: int, world_size: int, data_parallel: bool) -> None:
    product = f"tensor {tp} x pipeline {pp} = {tp * pp} processes"
    if world_size % (tp * pp) == 0 and (data_parallel or world_size == tp * pp):
        return
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{product} are needed, but this is one process alone: start it with torchrun --nproc-per-node {tp * pp}"
        )
    if data_parallel:
        raise UserError(f"{world_size} processes cannot be divided into groups of {product}")
    raise UserError(
        f"{product} are needed, but {world_size} were started: set "
        f"--tensor-model-parallel-size and --pipeline-model-parallel-size so that their product is {world_size}"
    )
