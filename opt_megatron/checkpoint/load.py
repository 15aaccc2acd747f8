"""Loads a checkpoint into a model: each rank reads only its own slices.

This module and `load_numbers` are the only ones of the package that depend on the model and the process groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..config import OPTConfig, check_dtype
from ..errors import UserError
from ..files import ProgressLines, progress_bar
from ..model.parameter_names import local_parameters
from ..parallel.agreement import check_same_on_all_ranks
from ..parallel.context import ParallelContext, on_all_ranks
from .adapter import Adapter
from .checkpoint import Checkpoint
from .checkpoint_facts import checkpoint_facts
from .formats.registry import open_checkpoint
from .load_numbers import holds_numbers, read_numbers
from .locate import locate
from .parameter_mapping import (
    ParameterMapping,
    Split,
    block_view,
    component_view,
    even_stage_parameters,
    rank_block,
    row_pieces,
)
from .storage.blocks import BLOCK_BYTES

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..model.opt_model import OPTModel

_QUICK_SECONDS = 2.0  # a model that is loaded by then needs no progress bar


def locate_on_all_ranks(name: str, parallel: ParallelContext, revision: str | None = None) -> Path:
    """`locate` on every rank. The first process of each machine goes first, so that a model is downloaded once."""
    found = on_all_ranks(parallel, lambda: locate(name, revision) if parallel.local_rank == 0 else None)
    return on_all_ranks(parallel, lambda: found or locate(name, revision))


def open_on_all_ranks(
    name: str,
    parallel: ParallelContext,
    revision: str | None = None,
    config: OPTConfig | None = None,
    adapter: str | None = None,
) -> Checkpoint:
    """Locate and open a checkpoint on every rank, and compare what they have found: it may be anywhere, but the same.

    Args:
        config, adapter: as for `open_checkpoint`; the adapter is located, too.

    Raises:
        UserError: on every rank; it cannot be opened, or a rank has found another model.
    """
    directory = locate_on_all_ranks(name, parallel, revision)
    adapter_directory = None if adapter is None else locate_on_all_ranks(adapter, parallel)

    def read() -> tuple[Checkpoint, dict[str, str]]:
        checkpoint = open_checkpoint(directory, config, adapter_directory)
        return checkpoint, checkpoint_facts(checkpoint) if parallel.world_size > 1 else {}

    checkpoint, facts = on_all_ranks(parallel, read)
    check_same_on_all_ranks(parallel.control_group, facts, str(checkpoint.path))
    return checkpoint


def load_model(
    source: str | Path | Checkpoint,
    config: OPTConfig | None,
    parallel: ParallelContext,
    dtype: str = "auto",
    *,
    quantization: str | None = None,
) -> OPTModel:
    """Build this rank's part of the model and read its weights.

    Args:
        source: a checkpoint in any format, opened or not.
        config: by default the checkpoint's own.
        dtype: `float32`, `float16`, `bfloat16`, or `auto`: on a GPU the checkpoint's; on a CPU float32, where a 16-bit
            checkpoint's linear weights and embedding stay as they are if there are kernels for that (csrc/).
        quantization: one of `model.linear_methods.registry.quantizations()`; quantised tensor by tensor, so that no
            more than one is ever held as floats.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit its config; raised on every rank.
        UserError: the model does not divide by the layout.
    """
    from ..model.opt_model import build_model

    def load() -> OPTModel:
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source), config)
        torch_dtype = resolve_dtype(dtype, checkpoint.config, parallel.device)
        weight_dtype = None
        if dtype == "auto" and quantization is None:
            weight_dtype = _stored_dtype(checkpoint, torch_dtype, parallel.device)
        model = build_model(
            checkpoint.config, parallel, torch_dtype, quantization=quantization, weight_dtype=weight_dtype
        )
        load_weights(model, checkpoint, parallel)
        if quantization is not None or weight_dtype is not None:
            model.prepare_inference()  # such weights can only be used for inference
        return model.requires_grad_(False)

    return on_all_ranks(parallel, load)


def _stored_dtype(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype of all the checkpoint's matrices, if a model of `dtype` can keep them in it."""
    from ..model.linear_methods.registry import can_store

    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}
    if len(dtypes) != 1 or checkpoint.adapter is not None:  # an adapter's sum with a weight is not of 16 bits
        return None
    stored = dtypes.pop()
    return stored if stored is not dtype and can_store(stored, device, dtype) else None


def load_weights(model: nn.Module, checkpoint: Checkpoint, parallel: ParallelContext) -> None:
    """Read the weights of this rank's part of the model.

    Raises:
        CheckpointError: a tensor cannot be read.
        RuntimeError: the parameter mapping and the model disagree (a bug of this project).
    """
    from ..model.linear import DeferredWeight, PackableLinear
    from ..model.linear_methods.int4_groups import Int4Method
    from ..model.lora import is_factor

    targets = local_parameters(model)
    stage, stages = parallel.pipeline_model_parallel_rank, parallel.pipeline_model_parallel_size
    mapping = even_stage_parameters(checkpoint.config, stages, stage)
    stored = {name for name in targets if not is_factor(name)}  # LoRA's factors keep their initial values
    if {parameter.megatron for parameter in mapping} != stored:
        difference = sorted({parameter.megatron for parameter in mapping} ^ stored)
        raise RuntimeError(f"the parameter mapping and the model differ in {difference}")
    rank, ranks = parallel.tensor_model_parallel_rank, parallel.tensor_model_parallel_size
    total = sum(targets[parameter.megatron].nbytes for parameter in mapping)
    with torch.no_grad(), _loading_bar(total, parallel) as bar:
        for parameter in mapping:
            target = targets[parameter.megatron]
            if target.device.type != "meta":
                read_parameter(target, checkpoint, parameter, rank, ranks)
            else:
                module = cast(DeferredWeight, model.get_submodule(parameter.megatron.removesuffix(".weight")))
                if holds_numbers(checkpoint, parameter, module.method):
                    size = cast(type[Int4Method], module.method).group_size
                    numbers = read_numbers(target, checkpoint, parameter, rank, ranks, size, parallel.device)
                    cast(PackableLinear, module).store_numbers(numbers)
                else:
                    weight = torch.empty(target.shape, dtype=target.dtype, device=parallel.device)
                    read_parameter(weight, checkpoint, parameter, rank, ranks)
                    module.store_weight(weight)
            bar.update(target.nbytes)


def _loading_bar(total: int, parallel: ParallelContext) -> tqdm | ProgressLines:
    hidden = not parallel.is_leader
    return progress_bar("loading", unit="B", unit_scale=True, total=total, delay=_QUICK_SECONDS, hidden=hidden)


def read_parameter(target: Tensor, checkpoint: Checkpoint, parameter: ParameterMapping, rank: int, ranks: int) -> None:
    """Read into `target` what tensor parallel rank `rank` of `ranks` holds of a parameter.

    Only these bytes are read. The values are cast to the target's dtype and moved to its device.
    """
    count = len(parameter.canonical)
    for index, name in enumerate(parameter.canonical):
        block = rank_block(checkpoint.tensors[name].shape, parameter.split, rank, ranks)
        view = block_view(target, index, count, checkpoint.config.head_dim, block)
        if count == 1:
            target[len(view) :].zero_()  # padding of the vocabulary
        # Few rows at a time are still in the processor's cache when they are copied.
        for part, part_block in row_pieces(view, block, BLOCK_BYTES // checkpoint.tensors[name].dtype.itemsize):
            part.copy_(checkpoint.read(name, part_block).reshape(part.shape))


@torch.no_grad()
def load_adapter(model: nn.Module, adapter: Adapter, config: OPTConfig, parallel: ParallelContext) -> None:
    """Read this rank's part of LoRA's factors into a model whose layers are `adapter.megatron_layers`.

    Where q, k and v have scales of their own, what differs from the layer's becomes a part of B.

    Raises:
        CheckpointError: a factor cannot be read.
    """
    from ..model.lora import adapted_layers

    layers = dict(adapted_layers(model))
    stage, stages = parallel.pipeline_model_parallel_rank, parallel.pipeline_model_parallel_size
    rank, ranks = parallel.tensor_model_parallel_rank, parallel.tensor_model_parallel_size
    for parameter in even_stage_parameters(config, stages, stage):
        layer = layers.get(parameter.megatron.removesuffix(".weight"))
        if layer is None:
            continue
        split_a, split_b = (
            (Split.ROW, Split.REPLICATED) if parameter.split is Split.ROW else (Split.REPLICATED, Split.COLUMN)
        )
        start = 0  # of the rows of A that belong to the next component
        for index, name in enumerate(parameter.canonical):
            factors = adapter.factors.get(name)
            if factors is None:
                continue
            own = slice(start, start + factors.rank)
            layer.lora_a[own].copy_(factors.a.read(rank_block(factors.a.shape, split_a, rank, ranks)))
            b = component_view(layer.lora_b, index, len(parameter.canonical), config.head_dim)[..., own]
            ratio = 1.0 if factors.scale == layer.lora.scale else factors.scale / layer.lora.scale
            b.copy_(factors.b.read(rank_block(factors.b.shape, split_b, rank, ranks)).reshape(b.shape) * ratio)
            start = own.stop


def resolve_dtype(name: str, config: OPTConfig, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; `auto` is float32 on a CPU and the checkpoint's dtype on a GPU.

    Raises:
        UserError: not one of the known names.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else config.dtype
    try:
        check_dtype(name)
    except UserError as error:
        raise UserError(f"{error} (or auto)") from None
    return getattr(torch, name)
