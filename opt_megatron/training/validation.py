"""The loss on held-out data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from ..data.dataloader import BatchLoader, SampleDataset
from ..parallel.context import ParallelContext
from .loss import forward_backward


@torch.no_grad()
def validation_loss(
    model: DistributedDataParallel,
    data: SampleDataset,
    parallel: ParallelContext,
    micro_batch_size: int,
    iterations: int,
) -> tuple[float, int]:
    """(mean loss in nats per token, number of tokens) over the first samples of a data set, without dropout.

    Collective; every rank gets the same numbers.

    Args:
        iterations: micro-batches of each data-parallel rank; 0 takes all whole ones there are.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    ranks = parallel.data_parallel_size
    size = min(micro_batch_size, max(1, len(data) // ranks))
    with BatchLoader(data, size * ranks, size, parallel.data_parallel_rank, ranks) as loader:
        for number, micro_batches in enumerate(loader, 1):
            loss_sum = forward_backward(model, micro_batches, parallel.device, forward_only=True)
            sums += loss_sum.contribution(parallel)
            if number == iterations:
                break
    dist.all_reduce(sums, group=parallel.control_group)
    model.train(was_training)
    total, tokens = sums.tolist()
    return (total / tokens if tokens else float("nan")), int(tokens)
