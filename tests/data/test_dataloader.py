"""Global batches: the same samples on every layout, resumed anywhere, read ahead without hiding errors."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_megatron.data.dataloader import BatchLoader
from opt_megatron.errors import UserError


class Numbers:
    """Sample n is [n, n] twice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.broken: set[int] = set()
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index in self.broken:
            raise OSError(f"sample {index} cannot be read")
        self.read.append(index)
        return {"tokens": torch.full((2,), index), "loss_mask": torch.full((2,), float(index))}


def samples(micro_batches: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The numbers of the samples, a list for each micro-batch."""
    for micro in micro_batches:
        assert micro["tokens"].shape == micro["loss_mask"].shape == (len(micro["tokens"]), 2)
        assert torch.equal(micro["tokens"].float(), micro["loss_mask"])
    return [micro["tokens"][:, 0].tolist() for micro in micro_batches]


@given(
    micro=st.integers(1, 3), ranks=st.integers(1, 4), times=st.integers(1, 3), steps=st.integers(1, 3), more=st.data()
)
@settings(deadline=None, max_examples=50)
def test_ranks_share_each_global_batch_by_micro_batches_in_turn(
    micro: int, ranks: int, times: int, steps: int, more: st.DataObject
) -> None:
    size = micro * ranks * times
    start = more.draw(st.integers(0, 5))
    dataset = Numbers(start + steps * size + more.draw(st.integers(0, size - 1)))
    every = [BatchLoader(dataset, size, micro, rank, ranks, start) for rank in range(ranks)]
    for step in range(steps):
        first = start + step * size
        shares = [samples(next(batches)) for batches in every]
        in_turn = [share[n] for n in range(times) for share in shares]
        assert in_turn == [list(range(first + j * micro, first + (j + 1) * micro)) for j in range(size // micro)]
    for batches in every:
        assert batches.consumed_samples == start + steps * size
        assert list(batches) == []  # what is left is not a whole batch
        batches.close()


def test_resuming_on_another_layout_goes_on_with_the_next_sample() -> None:
    dataset = Numbers(100)
    with BatchLoader(dataset, 8, 2, 1, 2) as two:
        assert [samples(next(two)) for _ in range(3)][-1] == [[18, 19], [22, 23]]
    assert two.consumed_samples == 24  # not what was read ahead
    with BatchLoader(dataset, 8, 1, 3, 4, two.consumed_samples) as four:
        assert samples(next(four)) == [[27], [31]]
        assert len(four) == (100 - 32) // 8


def test_nothing_is_read_before_the_first_batch_and_one_batch_ahead_after_it() -> None:
    dataset = Numbers(100)
    before = threading.active_count()
    batches = BatchLoader(dataset, 4, 2)
    assert threading.active_count() == before and dataset.read == []
    next(batches)
    batches._next.result()
    assert dataset.read == list(range(8))
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_an_error_in_the_background_is_raised_where_the_batch_is_asked_for() -> None:
    dataset = Numbers(12)
    dataset.broken = {5}
    with BatchLoader(dataset, 4, 2) as batches:
        assert samples(next(batches)) == [[0, 1], [2, 3]]
        for _ in range(2):  # and again: a batch is never left out
            with pytest.raises(OSError, match="sample 5 cannot be read"):
                next(batches)
        assert batches.consumed_samples == 4
        dataset.broken = set()
        assert samples(next(batches)) == [[4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((6, 2, 0, 2), "--global-batch-size 6 cannot be divided by micro-batch 2 x data parallel 2 = 4"),
        ((0, 1, 0, 1), "--global-batch-size is 0"),
        ((4, -1, 0, 1), "--micro-batch-size is -1"),
        ((4, 1, 0, 1, 11), "11 samples have been consumed, but the data set holds 10"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_numbers(sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchLoader(Numbers(10), *sizes)
