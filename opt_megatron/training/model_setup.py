"""Building the model and the optimizer of a run."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import nn

from ..checkpoint.checkpoint_facts import adapter_facts
from ..checkpoint.load import load_adapter, load_weights, open_on_all_ranks
from ..checkpoint.parameter_mapping import even_stage_parameters
from ..config import OPTConfig
from ..model.lora_options import are_alike
from ..model.opt_model import build_model
from ..model.parameter_names import local_parameters
from ..parallel.agreement import check_same_on_all_ranks
from ..parallel.context import ParallelContext, on_all_ranks
from ..parallel.core_compat import prepare_training
from .cpu_optimizer import CPUOptimizer
from .init_weights import init_lora_weights, init_weights
from .megatron_optimizer import MegatronOptimizer
from .optimizer import TrainingOptimizer
from .training_options import TrainingOptions


class _ParallelParameter(nn.Parameter):
    """For annotations: a parameter with megatron-core's attributes for tensor parallelism."""

    tensor_model_parallel: bool
    partition_dim: int
    partition_stride: int


def setup_model_and_optimizer(
    options: TrainingOptions, parallel: ParallelContext
) -> tuple[DistributedDataParallel, TrainingOptimizer]:
    """The model with its initial or loaded weights, in DistributedDataParallel, and its optimizer. Collective."""
    prepare_training(parallel.device)
    seed_dropout(options.seed, parallel)
    module = build_model(
        options.config,
        parallel,
        options.dtype,
        parallel_output=True,
        lora=options.lora_layers,
        **_core_config(options, parallel),
    )
    _mark_tensor_parallel_parameters(module, options.config, parallel)
    _load_or_init_weights(module, options, parallel)
    model = _wrap(module, options, parallel)
    optimizer = _make_optimizer(model, options, parallel)
    module.config.grad_scale_func = optimizer.scale_loss
    module.config.finalize_model_grads_func = finalize_model_grads
    module.config.no_sync_func = model.no_sync
    return model, optimizer


def _core_config(options: TrainingOptions, parallel: ParallelContext) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that only training sets."""
    fields: dict[str, Any] = {
        "calculate_per_token_loss": True,
        "hetereogenous_dist_checkpoint": not are_alike(options.lora_layers, options.config.num_layers),
        "sequence_parallel": options.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "transformer_impl": options.transformer_impl,
        "cross_entropy_loss_fusion": options.cross_entropy_loss_fusion,
    }
    if options.recompute_granularity == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif options.recompute_granularity == "selective":
        fields |= {"recompute_granularity": "selective"}
    return fields


def _mark_tensor_parallel_parameters(model: nn.Module, config: OPTConfig, parallel: ParallelContext) -> None:
    """Set megatron-core's attributes for tensor parallelism, which the norm of the gradients depends on.

    Core sets them only where it initialises the parameters itself.
    """
    stages, stage = parallel.pipeline_model_parallel_size, parallel.pipeline_model_parallel_rank
    parameters = local_parameters(model)
    for mapping in even_stage_parameters(config, stages, stage):
        parameter, dim = cast(_ParallelParameter, parameters[mapping.megatron]), mapping.split.value
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim, parameter.partition_stride = (-1 if dim is None else dim), 1


def _load_or_init_weights(model: nn.Module, options: TrainingOptions, parallel: ParallelContext) -> None:
    config = options.config
    if options.load is None:
        init_weights(model, config, parallel, options.seed, options.init_std)
    else:
        checkpoint = open_on_all_ranks(options.load, parallel, options.revision)
        on_all_ranks(parallel, lambda: load_weights(model, checkpoint, parallel))
    if options.adapter is not None:
        adapter = options.adapter
        check_same_on_all_ranks(parallel.control_group, on_all_ranks(parallel, lambda: adapter_facts(adapter)))
        on_all_ranks(parallel, lambda: load_adapter(model, adapter, config, parallel))
    elif options.lora is not None:
        init_lora_weights(model, config, parallel, options.seed)


def _wrap(module: nn.Module, options: TrainingOptions, parallel: ParallelContext) -> DistributedDataParallel:
    is_cuda = parallel.device.type == "cuda"
    overlaps = is_cuda and parallel.data_parallel_size > 1
    return DistributedDataParallel(
        config=module.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlaps,
            overlap_param_gather=overlaps and options.optimizer.overlap_param_gather,
            use_distributed_optimizer=is_cuda and options.optimizer.use_distributed_optimizer,
        ),
        module=module,
    )


def _make_optimizer(
    model: DistributedDataParallel, options: TrainingOptions, parallel: ParallelContext
) -> TrainingOptimizer:
    if parallel.device.type == "cuda":
        return MegatronOptimizer([model], options.optimizer, options.dtype, options.schedule.lr)
    return CPUOptimizer(model.parameters(), options.optimizer)


def seed_dropout(seed: int, parallel: ParallelContext) -> None:
    """Seed the random states of dropout.

    Tensor-parallel ranks share the default state and differ in megatron-core's tracked one (core's rule); pipeline
    stages and data-parallel ranks differ in both.
    """
    from megatron.core import tensor_parallel

    rank_seed = seed + 100 * parallel.pipeline_model_parallel_rank + 10_000 * parallel.data_parallel_rank
    torch.manual_seed(rank_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(rank_seed)
