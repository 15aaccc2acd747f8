"""What a run is about to do, in a few lines."""

from __future__ import annotations

from torch import nn

from ..config import dtype_name
from ..parallel.context import ParallelContext
from .training_options import TrainingOptions


def header_lines(options: TrainingOptions, parallel: ParallelContext, model: nn.Module) -> list[str]:
    """Lines on the model, the layout and the steps; collective.

    Args:
        model: this rank's part.
    """
    config, trainer = options.config, options.trainer
    trained = sum(parallel.gather_objects(_num_counted(model, parallel))) if options.lora_layers else None
    name = f"{config.name}, " if config.name else ""
    share = "all trainable" if trained is None else f"{trained:,} trainable factors of LoRA"
    return [
        f"model: {name}{config.num_parameters:,} parameters in {dtype_name(options.dtype)}, {share}",
        f"layout: tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"data {parallel.data_parallel_size} ranks" + (", sequence parallel" if options.sequence_parallel else ""),
        f"run: {trainer.train_iters:,} steps of {_step_in_words(options)}",
    ]


def _step_in_words(options: TrainingOptions) -> str:
    trainer = options.trainer
    if options.mezo is not None:
        return f"{trainer.global_batch_size:,} examples of at most {trainer.seq_length:,} tokens, by MeZO"
    tokens = trainer.train_iters * trainer.global_batch_size * trainer.seq_length
    return f"{trainer.global_batch_size:,} sequences of {trainer.seq_length:,} tokens, {tokens:,} tokens"


def _num_counted(model: nn.Module, parallel: ParallelContext) -> int:
    """Trained numbers of this rank, without those that another rank has too."""
    if parallel.data_parallel_rank:
        return 0
    is_first = parallel.tensor_model_parallel_rank == 0
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad and (is_first or getattr(parameter, "tensor_model_parallel", False))
    )
