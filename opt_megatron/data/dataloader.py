"""Global batches of a map-style data set, divided among data-parallel ranks.

    global batch, G = 8, micro-batch 2, two ranks          sample  0 1 | 2 3 | 4 5 | 6 7
                                                           rank     0     1     0     1

The next global batch is the next G samples, and its micro-batch j holds the samples j * b to (j + 1) * b - 1,
whatever the layout; rank r takes the micro-batches r, r + size, r + 2 * size, ... as Megatron-LM does. A run
that is resumed on another number of ranks therefore sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from ..errors import UserError

MicroBatch = dict[str, torch.Tensor]  # name -> [b, s]


class SampleDataset(Protocol):
    """Samples by number, each a dict of tensors, which have the same shapes in all samples."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample, name -> [s]."""


def num_micro_batches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Number of micro-batches that each rank computes in one step.

    Raises:
        UserError: the sizes are not positive, or the global batch is not a whole number of micro-batches a rank.
    """
    for name, size in (("global", global_batch_size), ("micro", micro_batch_size)):
        if size < 1:
            raise UserError(f"--{name}-batch-size is {size}, but must be at least 1")
    at_once = micro_batch_size * data_parallel_size
    if global_batch_size % at_once:
        raise UserError(
            f"--global-batch-size {global_batch_size} cannot be divided by micro-batch {micro_batch_size} x "
            f"data parallel {data_parallel_size} = {at_once}"
        )
    return global_batch_size // at_once


class BatchLoader:
    """Iterates over this rank's shares of the global batches, and reads the next one in a background thread.

    The thread starts with the first batch. Iteration ends when fewer than `global_batch_size` samples are left.

    Args:
        dataset: read by one thread at a time.
        consumed_samples: samples that earlier steps have taken on all ranks; the position to resume at.
        pin_memory: batches in pinned memory, which a GPU copies while the host goes on.

    Raises:
        UserError: the sizes do not divide, or the position is outside the data set.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        *,
        pin_memory: bool = False,
    ) -> None:
        self.num_micro_batches = num_micro_batches(global_batch_size, micro_batch_size, data_parallel_size)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} of {data_parallel_size}")
        if not 0 <= consumed_samples <= len(dataset):
            raise UserError(
                f"{consumed_samples} samples have been consumed, but the data set holds {len(dataset)}: "
                "is this another data set than the run began with?"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self._dataset = dataset
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._consumed, self._pin_memory = consumed_samples, pin_memory
        self._reader: ThreadPoolExecutor | None = None
        self._next: Future[list[MicroBatch]] | None = None
        self._closed = False

    @property
    def consumed_samples(self) -> int:
        """Number of samples in the global batches returned so far; what a checkpoint stores."""
        return self._consumed

    def __len__(self) -> int:
        """Number of whole global batches that are left."""
        return (len(self._dataset) - self._consumed) // self.global_batch_size

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next global batch, in order.

        An exception of the data set in the background thread is raised here, and the position does not change.
        """
        if self._closed:
            raise ValueError("these batches are closed")
        if not len(self):
            raise StopIteration
        ready = self._next or self._read_ahead()
        self._next = None
        batch = ready.result()
        self._consumed += self.global_batch_size
        if len(self):
            self._next = self._read_ahead()
        return batch

    def close(self) -> None:
        """Stop the background thread after the sample that it is reading. `consumed_samples` remains valid."""
        self._closed = True
        self._next = None
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> Future[list[MicroBatch]]:
        if self._reader is None:
            self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        return self._reader.submit(self._read, self._consumed)

    def _read(self, first: int) -> list[MicroBatch]:
        stride = self._size * self.micro_batch_size
        begin = first + self._rank * self.micro_batch_size
        try:
            return [self._micro_batch(begin + n * stride) for n in range(self.num_micro_batches)]
        except StopIteration as error:  # unchanged, it would end the caller's loop without an error
            raise RuntimeError("the data set raised StopIteration") from error

    def _micro_batch(self, first: int) -> MicroBatch:
        samples = []
        for index in range(first, first + self.micro_batch_size):
            if self._closed:
                break
            samples.append(self._dataset[index])
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]} if samples else {}
        return {name: values.pin_memory() for name, values in batch.items()} if self._pin_memory else batch
