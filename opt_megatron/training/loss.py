"""Loss and gradients of one step, by megatron-core's forward-backward schedules.

The loss is the mean over all tokens of the global batch that the loss mask counts: the schedules add up sums and
numbers of tokens, so it depends neither on the size of the micro-batches nor on the data-parallel size.
b = sequences of a micro-batch, s = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..data.dataloader import MicroBatch
from ..parallel.context import ParallelContext


@dataclass(frozen=True)
class LossSum:
    """Sum of the losses (nats) and number of tokens of one rank's micro-batches; 0 except on the last stage."""

    total: Tensor
    tokens: Tensor

    def contribution(self, parallel: ParallelContext) -> Tensor:
        """[loss, tokens] to sum over all ranks: zeros on those whose tokens another rank counts already."""
        is_counted = parallel.is_last_stage and parallel.tensor_model_parallel_rank == 0
        return torch.stack([self.total, self.tokens]).cpu() if is_counted else torch.zeros(2, dtype=torch.float64)


def forward_backward(
    model: DistributedDataParallel,
    micro_batches: list[MicroBatch],
    device: torch.device,
    *,
    forward_only: bool = False,
) -> LossSum:
    """Run all micro-batches, and leave the gradients of the mean loss in `main_grad` of the parameters.

    Args:
        forward_only: compute no gradients.
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
        None if segments is None else segment_attention_mask(segments),
        labels=batch["labels"],
    )
    return output, partial(_masked_loss_sum, batch["loss_mask"])


def _masked_loss_sum(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(loss, number of tokens, values to return), as megatron-core's schedules expect them; inputs are [b, s]."""
    # where, not a product: an infinite loss under a mask of zero would give NaN.
    total = torch.where(mask > 0, losses.float() * mask, 0.0).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), (total.detach().double(), tokens.double())


def segment_attention_mask(segments: Tensor) -> Tensor:
    """[b, 1, s, s] bool, True where a query may attend: earlier tokens of the same segment, and itself.

    Args:
        segments: [b, s], one number for each packed example; 0 is padding.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril_()[:, None]


def _add(values: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float64)
