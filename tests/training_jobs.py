"""Jobs that ranks run for the tests of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import stub_transformer_engine
import torch
from megatron.core.distributed import DistributedDataParallel

from opt_megatron.checkpoint.formats.registry import open_adapter, open_checkpoint
from opt_megatron.data import index_cache
from opt_megatron.data.dataloader import BatchLoader
from opt_megatron.data.options import DataOptions, SupervisedOptions
from opt_megatron.errors import UserError
from opt_megatron.model import parameter_names
from opt_megatron.parallel.context import ParallelContext, init_parallel
from opt_megatron.training.checkpointing import integrity
from opt_megatron.training.checkpointing.integrity import newest_intact_checkpoint
from opt_megatron.training.checkpointing.manager import CheckpointManager
from opt_megatron.training.checkpointing.run_checkpoints import TrainingState
from opt_megatron.training.header import header_lines
from opt_megatron.training.loss import forward_backward
from opt_megatron.training.lr_schedule import LRSchedule
from opt_megatron.training.model_setup import seed_dropout, setup_model_and_optimizer
from opt_megatron.training.optimizer import TrainingOptimizer
from opt_megatron.training.options import TrainerOptions
from opt_megatron.training.train import train
from opt_megatron.training.trainer import Trainer
from opt_megatron.training.training_options import TrainingOptions
from opt_megatron.training.validation import validation_loss

SEQ, GLOBAL = 32, 8


class RandomTokens(torch.utils.data.Dataset):
    """Samples of random tokens, the same for the same seed; with `packed`, two texts in each."""

    def __init__(
        self, num_samples: int, vocab_size: int, seq_length: int = SEQ, seed: int = 0, *, packed: bool = False
    ) -> None:
        self._packed = packed
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(4, vocab_size, (num_samples, seq_length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._tokens[index]
        mask = torch.ones(len(row) - 1)
        mask[: index % 3] = 0  # unequal numbers of tokens, so that a mean of means would differ
        sample = {"tokens": row[:-1], "labels": row[1:], "loss_mask": mask, "position_ids": torch.arange(len(row) - 1)}
        if self._packed:
            sample["segment_ids"] = 1 + torch.arange(len(mask)) * 2 // len(mask)
        return sample


def settings_for(directory: Path, iterations: int = 1, micro: int = 4, **changes: Any) -> TrainingOptions:
    """Settings of a short run that begins with a checkpoint's weights, without dropout."""
    config = open_checkpoint(directory).config.replace(dropout=0.0, attention_dropout=0.0)
    settings = TrainingOptions(
        config=config,
        schedule=LRSchedule(3e-3, 3e-4, 5, max(iterations, 5)),
        trainer=TrainerOptions(iterations, GLOBAL, SEQ, micro, log_interval=1),
        load=str(directory),
    )
    adapter = changes.pop("adapter", None)
    return with_adapter(replace(settings, **changes), adapter)


def with_adapter(settings: TrainingOptions, directory: Path | None) -> TrainingOptions:
    """The settings with an adapter of peft that is trained further; an open one cannot be sent to a rank."""
    return settings if directory is None else replace(settings, adapter=open_adapter(directory, settings.config))


def start(tp: int, pp: int) -> ParallelContext:
    """Groups of this layout on the running world; what remains of it is data parallel."""
    return init_parallel(tp, pp, seed=1)


def _batches(settings: TrainingOptions, parallel: ParallelContext, num_samples: int) -> BatchLoader:
    options = settings.trainer
    data = RandomTokens(num_samples, settings.config.vocab_size, options.seq_length)
    place = (parallel.data_parallel_rank, parallel.data_parallel_size)
    return BatchLoader(data, options.global_batch_size, options.micro_batch_size, *place)


def setup(settings: TrainingOptions, parallel: ParallelContext) -> tuple[DistributedDataParallel, TrainingOptimizer]:
    """Model and optimizer, with a stand-in for TransformerEngine."""
    with stub_transformer_engine.installed():
        return setup_model_and_optimizer(settings, parallel)


def gradients(
    directory: Path, tp: int, pp: int, changes: dict[str, Any]
) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """One step's (sum of losses, tokens), the norm of the gradients, and those that this rank holds."""
    parallel = start(tp, pp)
    settings = settings_for(directory, **changes)
    model, optimizer = setup(settings, parallel)
    model.train()
    model.zero_grad_buffer()
    with _batches(settings, parallel, GLOBAL) as batches:
        sums = forward_backward(model, next(batches), parallel.device)
    losses = [float(sums.total), float(sums.tokens)] if parallel.is_last_stage else [0.0, 0.0]
    found = {name: p.main_grad.clone() for name, p in model.module.named_parameters() if p.requires_grad}
    return losses, optimizer.step(0.0).grad_norm, found


def loss_curve(
    directory: Path, tp: int, pp: int, iterations: int, changes: dict[str, Any], packed: bool = False
) -> list[float]:
    """The losses of a run's steps, the same on every rank."""
    parallel = start(tp, pp)
    settings = settings_for(directory, iterations, **changes)
    model, optimizer = setup(settings, parallel)
    seen: list[float] = []

    class Watched(Trainer):
        def _all_reduce_report(self, *args: Any) -> Any:
            report = super()._all_reduce_report(*args)
            seen.append(report.loss)
            return report

    data = RandomTokens(GLOBAL * 4, settings.config.vocab_size, packed=packed)
    repeated = torch.utils.data.ConcatDataset([data] * (iterations // 4 + 1))
    Watched(
        model, settings.config, optimizer, settings.schedule, parallel, settings.trainer,
        repeated, None, None, TrainingState(), None,
    ).run()  # fmt: skip
    return seen


def whole_run(
    save: Path, tp: int, pp: int, settings: TrainingOptions, exit_iters: int = 0, adapter: Path | None = None
) -> list[str]:
    """`train` from beginning, or from what `save` holds, to the end or to `exit_iters`; what the leader said."""
    parallel = start(tp, pp)
    settings = with_adapter(settings, adapter)
    trainer = replace(settings.trainer, exit_iters=exit_iters)
    said: list[str] = []
    with stub_transformer_engine.installed():
        train(replace(settings, save=save, trainer=trainer), parallel, said.append)
    return said


def refusal(save: Path, settings: TrainingOptions) -> str:
    """Why `train` does not begin."""
    parallel = start(1, 1)
    try:
        train(replace(settings, save=save), parallel)
    except UserError as error:
        return str(error)
    return ""


def run_by_old_names(save: Path, settings: TrainingOptions, exit_iters: int) -> None:
    """`whole_run` of one rank that names the norms in its checkpoints as they are called in the model."""
    with mock.patch.dict(parameter_names.TRANSFORMER_ENGINE_NAMES, clear=True):
        whole_run(save, 1, 1, settings, exit_iters)


def runs_that_differ(directory: Path, corpus: str, pairs: list[str], saved: Path) -> dict[str, str]:
    """The messages where rank 1 has another learning rate, other data, another file of pairs, another checkpoint."""
    parallel = start(1, 1)
    base = settings_for(directory, tokenizer=directory)
    faster = replace(base.schedule, lr=base.schedule.lr * (1 + parallel.rank))
    indexed, supervised = DataOptions((corpus,)), SupervisedOptions((pairs[parallel.rank],))
    runs = {
        "options": lambda: train(replace(base, data=indexed, schedule=faster), parallel),
        "data": lambda: train(replace(base, data=indexed), parallel),
        "supervised": lambda: train(replace(base, supervised=supervised), parallel),
        "saved": lambda: newest_intact_checkpoint(saved, parallel),
    }
    seen = f"content of rank {parallel.rank}"
    messages = {}
    for name, run in runs.items():
        with (
            mock.patch.object(index_cache, "_content_facts", return_value=seen),
            mock.patch.object(integrity, "manifest_entry", return_value=(2, seen)),
        ):
            try:
                run()
            except UserError as error:
                messages[name] = str(error)
    return messages


def dropped(tp: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random numbers of this rank: hidden dropout's, attention dropout's, and hidden dropout's again."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    parallel = start(tp, 1)
    seed_dropout(1, parallel)
    first = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4)
    return first, own, torch.rand(4)


def lora_run(directory: Path, tp: int, pp: int, changes: dict[str, Any]) -> tuple[list[float], list[str]]:
    """Losses of ten steps, and the names of the parameters whose values have changed."""
    parallel = start(tp, pp)
    settings = settings_for(directory, 10, schedule=LRSchedule(5e-4, 5e-5, 0, 10), **changes)
    model, optimizer = setup_model_and_optimizer(settings, parallel)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    losses = []
    model.train()
    with _batches(settings, parallel, GLOBAL * 10) as batches:
        for step, micro_batches in enumerate(batches, 1):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            sums = forward_backward(model, micro_batches, parallel.device)
            optimizer.step(settings.schedule.at(step))
            values = torch.stack([sums.total, sums.tokens])
            if not (parallel.is_last_stage and parallel.tensor_model_parallel_rank == 0):
                values.zero_()
            torch.distributed.all_reduce(values)
            losses.append(float(values[0] / values[1]))
    changed = [name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])]
    return losses, changed


def initial_parameters(directory: Path, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """What this rank's part of a model begins with."""
    model, _ = setup_model_and_optimizer(settings_for(directory, load=None), start(tp, pp))
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def adapted_logits(
    save: Path, tp: int, pp: int, settings: TrainingOptions, adapter: Path | None = None
) -> tuple[list[str], torch.Tensor]:
    """Logits of a saved LoRA run by its unmerged layers, and the factors that are not zero."""
    parallel = start(tp, pp)
    model, optimizer = setup_model_and_optimizer(with_adapter(settings, adapter), parallel)
    checkpoints = CheckpointManager(save, parallel)
    checkpoints.load(newest_intact_checkpoint(save, parallel), model.module, optimizer, same_layout=True)
    model.eval()
    model.module.parallel_output = False
    with torch.no_grad():
        logits = model(torch.arange(4, 24)[None], None, None)
    return [name for name, p in model.module.named_parameters() if name.endswith("lora_b") and p.any()], logits


def header_and_validation(
    directory: Path, tp: int, pp: int, changes: dict[str, Any], num_samples: list[int]
) -> tuple[list[str], list[tuple[float, int]]]:
    """The lines before a run's first step, and the validation losses of 7 sequences, of at most so many each."""
    settings = settings_for(directory, **changes)
    parallel = start(tp, pp)
    model, _ = setup_model_and_optimizer(settings, parallel)
    data = RandomTokens(7, settings.config.vocab_size)
    return header_lines(settings, parallel, model), [
        validation_loss(model, data, parallel, 2, count) for count in num_samples
    ]
