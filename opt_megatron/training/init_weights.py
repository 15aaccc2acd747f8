"""Initial values of a model's parameters: OPT's distributions, the same numbers at every layout.

Each block of rows of each tensor has a separate generator, seeded by the run's seed, the tensor's name and the
block's number. A rank therefore generates only the rows that it holds (whole rows, also of row-parallel matrices),
and the model does not depend on how it is divided.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checkpoint.parameter_mapping import (
    EMBEDDING,
    POSITIONS,
    block_view,
    canonical_shapes,
    even_stage_parameters,
    layers_of_stage,
    rank_block,
)
from ..config import POSITION_OFFSET, OPTConfig
from ..model.initial_values import initial_lora_a, tensor_seed
from ..model.lora import adapted_layers
from ..model.parameter_names import local_parameters, whole_model_name
from ..parallel.context import ParallelContext
from .recipe import INIT_STD

_ROWS_PER_BLOCK = 64


def init_std_of(name: str, config: OPTConfig, std: float) -> float | None:
    """Standard deviation of a canonical tensor's initial values; None for biases (0) and norms (1 and 0).

    As in metaseq's baselines: `std`, and std / sqrt(2 L) for the matrices that write to the residual stream.
    The embedding projections of 350m have `std`, too.
    """
    if name.endswith(".bias") or "layer_norm" in name:
        return None
    if name.endswith(("out_proj.weight", "fc2.weight")):
        return std / math.sqrt(2 * config.num_layers)
    return std


@torch.no_grad()
def init_weights(
    model: nn.Module, config: OPTConfig, parallel: ParallelContext, seed: int, std: float = INIT_STD
) -> None:
    """Initialise this rank's part of the model, except LoRA's factors."""
    parameters = local_parameters(model)
    shapes = canonical_shapes(config)
    tp_rank, tp = parallel.tensor_model_parallel_rank, parallel.tensor_model_parallel_size
    stages, stage = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    for mapping in even_stage_parameters(config, stages, stage):
        target = parameters[mapping.megatron]
        for component, name in enumerate(mapping.canonical):
            block = rank_block(shapes[name], mapping.split, tp_rank, tp)
            view = block_view(target, component, len(mapping.canonical), config.head_dim, block)
            if len(mapping.canonical) == 1:
                target[len(view) :].zero_()  # padding of the vocabulary
            view.copy_(initial_values(name, config, seed, std, block[0])[:, *block[1:]].reshape(view.shape))


def initial_values(name: str, config: OPTConfig, seed: int, std: float, rows: slice | None = None) -> Tensor:
    """Initial values of rows of one canonical tensor, in float32: [rows, ...]; all rows if `rows` is None."""
    shape = canonical_shapes(config)[name]
    rows = rows or slice(0, shape[0])
    tensor_std = init_std_of(name, config, std)
    if tensor_std is None:
        value = 1.0 if name.endswith("layer_norm.weight") else 0.0
        return torch.full((rows.stop - rows.start, *shape[1:]), value)
    values = normal_rows(name, (shape[0], shape[1]), rows, seed) * tensor_std
    for index in _padding_rows(name, config):
        if rows.start <= index < rows.stop:
            values[index - rows.start] = 0
    return values


def normal_rows(name: str, shape: tuple[int, int], rows: slice, seed: int) -> Tensor:
    """Rows of an [R, C] matrix of standard normal numbers, which name and seed determine."""
    first, last = rows.start // _ROWS_PER_BLOCK, -(-rows.stop // _ROWS_PER_BLOCK)
    blocks = []
    for number in range(first, last):
        size = min(_ROWS_PER_BLOCK, shape[0] - number * _ROWS_PER_BLOCK)
        generator = torch.Generator().manual_seed(tensor_seed(name, number, seed))
        blocks.append(torch.randn(size, shape[1], generator=generator))
    start = first * _ROWS_PER_BLOCK
    return torch.cat(blocks)[rows.start - start : rows.stop - start]


@torch.no_grad()
def init_lora_weights(model: nn.Module, config: OPTConfig, parallel: ParallelContext, seed: int) -> None:
    """Initialise LoRA's factors, the same at every layout: A as `initial_lora_a`, and B is 0."""
    first = layers_of_stage(
        config.num_layers, parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    ).start
    for name, layer in adapted_layers(model):
        whole_name = whole_model_name(name, first)
        is_parallel = getattr(layer.lora_a, "tensor_model_parallel", False)
        divided = is_parallel and getattr(layer.lora_a, "partition_dim", -1) == 1
        parts = parallel.tensor_model_parallel_size if divided else 1
        width = layer.lora_a.size(1)
        whole = initial_lora_a(whole_name, (layer.lora_a.size(0), width * parts), seed)
        start = parallel.tensor_model_parallel_rank * width if divided else 0
        layer.lora_a.copy_(whole[:, start : start + width])
        layer.lora_b.zero_()


def _padding_rows(name: str, config: OPTConfig) -> tuple[int, ...]:
    if name == EMBEDDING:
        return (config.pad_token_id,)
    # The tables of transformers and metaseq reserve row 1 for padding. Row 0 is never used.
    return (POSITION_OFFSET - 1,) if name == POSITIONS else ()
