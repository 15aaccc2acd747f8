"""Jobs that ranks run for the tests of training data."""

from __future__ import annotations

import torch

from opt_megatron.data.dataloader import BatchLoader
from opt_megatron.data.options import DataOptions
from opt_megatron.data.pretraining_dataset import build_datasets
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import init_parallel


def digest_of_batches(options: DataOptions, steps: int) -> list[list[list[int]]] | str:
    """This rank's first tokens of every micro-batch of some steps (global 6, micro 3), or the error's text."""
    parallel = init_parallel()
    try:
        train, _ = build_datasets(
            options, parallel, num_train_samples=12, num_valid_samples=0, seq_length=4, seed=3, vocab_size=500
        )
    except UserError as error:
        return str(error)
    with BatchLoader(train, 6, 3, parallel.data_parallel_rank, parallel.data_parallel_size) as batches:
        return [torch.cat([micro["tokens"] for micro in next(batches)]).tolist() for _ in range(steps)]
