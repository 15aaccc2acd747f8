"""The parameters that MeZO trains, on this rank, and their perturbation in place.

Every element has the normal number of its place in the whole tensor under its canonical name (LoRA's factors under
Megatron's, numbered as in the whole model), so the ranks together hold one z, whatever the layout: the rows of q, k and
v are taken apart, the padding of the vocabulary has none, and both copies of a tied embedding have the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.mezo.normal_numbers import normal_block, piece_elements
from ...checkpoint.mezo.steps import MezoStep, add_multiple, restore_and_update
from ...checkpoint.mezo.trained_tensor import repeat_steps
from ...checkpoint.parameter_mapping import (
    block_view,
    canonical_shapes,
    even_stage_parameters,
    layers_of_stage,
    rank_block,
    row_pieces,
)
from ...checkpoint.storage.blocks import Block
from ...model.lora import FACTORS, adapted_layers
from ...model.opt_model import OPTModel
from ...model.parameter_names import local_parameters, whole_model_name
from ...parallel.context import ParallelContext


class _TrainedPart(NamedTuple):
    """What this rank holds of a whole tensor: a view of a parameter (`block_view`)."""

    name: str
    view: Tensor
    block: Block


class Perturbation:
    """Changes the trained parameters of a model in place.

    Args:
        model: this rank's part; with LoRA its factors are trained, and otherwise all parameters.
        epsilon: size of the perturbations.
    """

    def __init__(self, model: OPTModel, parallel: ParallelContext, epsilon: float) -> None:
        self._epsilon = epsilon
        self._parts = list(_factors(model, parallel)) or list(_parameters(model, parallel))

    def forward(self, seed: int) -> None:
        """t += e z"""
        self._add(seed, self._epsilon)

    def backward(self, seed: int) -> None:
        """t -= 2 e z"""
        self._add(seed, -2 * self._epsilon)

    @torch.no_grad()
    def finish(self, step: MezoStep) -> None:
        """t += e z; t -= l g z"""
        for part, normal in self._pieces(step.seed):
            restore_and_update(part, normal, self._epsilon, step)

    @torch.no_grad()
    def repeat(self, steps: Sequence[MezoStep]) -> None:
        """Make all of these steps again."""
        for name, view, block in self._parts:
            repeat_steps(view, name, block, steps, self._epsilon)

    @torch.no_grad()
    def _add(self, seed: int, factor: float) -> None:
        for part, normal in self._pieces(seed):
            add_multiple(part, normal, factor)

    def _pieces(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the parameters, which cover them, and their normal numbers."""
        for name, view, block in self._parts:
            for part, part_block in row_pieces(view, block, piece_elements(view.device)):
                yield part, normal_block([seed], name, part_block, view.device).reshape(part.shape)


def _parameters(model: OPTModel, parallel: ParallelContext) -> Iterator[_TrainedPart]:
    config, parameters = model.opt_config, local_parameters(model)
    shapes = canonical_shapes(config)
    stages, stage = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    rank, ranks = parallel.tensor_model_parallel_rank, parallel.tensor_model_parallel_size
    for mapping in even_stage_parameters(config, stages, stage):
        target, count = parameters[mapping.megatron].detach(), len(mapping.canonical)
        for component, name in enumerate(mapping.canonical):
            block = rank_block(shapes[name], mapping.split, rank, ranks)
            yield _TrainedPart(name, block_view(target, component, count, config.head_dim, block), block)


def _factors(model: OPTModel, parallel: ParallelContext) -> Iterator[_TrainedPart]:
    stages, stage = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    first = layers_of_stage(model.opt_config.num_layers, stages, stage).start
    for module, layer in adapted_layers(model):
        for kind in FACTORS:
            factor = getattr(layer, kind)
            yield _TrainedPart(
                f"{whole_model_name(module, first)}.{kind}",
                factor.detach(),
                _factor_block(factor, parallel.tensor_model_parallel_rank),
            )


def _factor_block(factor: Tensor, rank: int) -> Block:
    """The place of this rank's part in the whole factor, by the attributes that Megatron-core gives parameters."""
    divided = getattr(factor, "partition_dim", -1) if getattr(factor, "tensor_model_parallel", False) else -1
    starts = [rank * size if dim == divided else 0 for dim, size in enumerate(factor.shape)]
    return tuple(slice(start, start + size) for start, size in zip(starts, factor.shape, strict=True))
