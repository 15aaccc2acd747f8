"""One step's loss and gradients through megatron-core's schedules.

The loss is the mean over all tokens that count, of the whole global batch: the schedules add up sums and numbers of
tokens, so it depends neither on how the batch is cut into micro-batches nor on the data-parallel size.
b = sequences of a micro-batch, s = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..data.dataloader import MicroBatch


@dataclass(frozen=True)
class LossSum:
    """Of one rank's micro-batches: the sum of the losses (nats) and the number of tokens. 0 but on the last stage."""

    total: Tensor
    tokens: Tensor


def forward_backward(
    model: nn.Module, micro_batches: list[MicroBatch], device: torch.device, *, forward_only: bool = False
) -> LossSum:
    """Run all micro-batches; afterwards the gradients of the mean loss stand in the parameters' `main_grad`.

    Args:
        model: wrapped in core's DistributedDataParallel.
    """
    batch_size, seq_length = micro_batches[0]["tokens"].shape
    sums = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, device),
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
    )
    totals, tokens = zip(*sums, strict=True) if sums else ((), ())
    return LossSum(_add(totals), _add(tokens))


def _forward_step(device: torch.device, batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
    batch = {name: values.to(device, non_blocking=True) for name, values in next(batches).items()}
    segments = batch.get("segment_ids")
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None if segments is None else attention_within_segments(segments),
        labels=batch["labels"],
    )
    return output, partial(_sum_losses, batch["loss_mask"])


def _sum_losses(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """core's convention: loss, number of tokens, what to keep. [b, s] each."""
    # where, not times: an infinite loss under a mask of zero would be NaN.
    total = torch.where(mask > 0, losses.float() * mask, 0.0).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), (total.detach().double(), tokens.double())


def attention_within_segments(segments: Tensor) -> Tensor:
    """[b, 1, s, s] bool, True where a query may look: earlier tokens of its own segment, and itself.

    Args:
        segments: [b, s], one number for each packed example; 0 is padding.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril_()[:, None]


def _add(values: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float64)
