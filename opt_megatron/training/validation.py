"""The loss on held-out data."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from ..data.dataloader import BatchLoader, SampleDataset
from ..parallel.context import ParallelContext
from .loss import forward_backward


class _FirstSamples:
    """The first samples of a data set, and samples without loss up to a whole number of batches of all ranks."""

    def __init__(self, data: SampleDataset, num_samples: int, multiple: int) -> None:
        self._data, self._num_samples = data, num_samples
        self._length = -(-num_samples // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < self._num_samples:
            return self._data[index]
        sample = self._data[0]
        return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


@torch.no_grad()
def validation_loss(
    model: DistributedDataParallel,
    data: SampleDataset,
    parallel: ParallelContext,
    micro_batch_size: int,
    num_samples: int,
) -> tuple[float, int]:
    """(mean loss in nats per token, number of tokens) over the first samples of a data set, without dropout.

    The samples are the same at every layout. Collective; every rank gets the same numbers.

    Args:
        num_samples: at most so many; 0 takes all there are.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    ranks = parallel.data_parallel_size
    count = min(num_samples or len(data), len(data))
    size = min(micro_batch_size, -(-count // ranks))
    samples = _FirstSamples(data, count, size * ranks)
    pinned = parallel.device.type == "cuda"
    with BatchLoader(samples, size * ranks, size, parallel.data_parallel_rank, ranks, pin_memory=pinned) as loader:
        for micro_batches in loader:
            loss_sum = forward_backward(model, micro_batches, parallel.device, forward_only=True)
            sums += loss_sum.contribution(parallel)
    dist.all_reduce(sums, group=parallel.control_group)
    model.train(was_training)
    total, tokens = sums.tolist()
    return (total / tokens if tokens else float("nan")), int(tokens)
