"""Small indexed corpora for the tests of training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from opt_megatron.data.options import DataOptions
from opt_megatron.data.pretraining_dataset import PretrainingDataset, build_datasets
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import ParallelContext

EOD = 2


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """An indexed data set of these documents, by megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def counting(documents: int, length: int, first: int = 10) -> list[list[int]]:
    """Documents of consecutive numbers from `first` on, each ended by EOD."""
    return [[*range(n, n + length - 1), EOD] for n in range(first, first + documents * (length - 1), length - 1)]


def build(
    parallel: ParallelContext, options: DataOptions, train: int = 8, valid: int | None = 0, **overrides: int
) -> tuple[PretrainingDataset, PretrainingDataset | None]:
    """The training and the validation set, by default of eight samples and none."""
    values = {"seq_length": 6, "seed": 1, "vocab_size": 500} | overrides
    return build_datasets(options, parallel, num_train_samples=train, num_valid_samples=valid, **values)


def tokens(dataset: PretrainingDataset) -> list[list[int]]:
    """The token ids of all samples."""
    return [dataset[n]["tokens"].tolist() for n in range(len(dataset))]


def refused(parallel: ParallelContext, options: DataOptions, **values: int) -> str:
    """The one line of the error that building the data sets raises."""
    with pytest.raises(UserError) as caught:
        build(parallel, options, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)
