"""Lazy tensors, on values that can be checked by eye."""

import torch

from opt_megatron.checkpoint.storage.blocks import whole
from opt_megatron.checkpoint.storage.lazy_tensor import Concatenated, wrap_tensor


def test_blocks_reach_across_pieces():
    pieces = [wrap_tensor(torch.tensor([[1, 2]])), wrap_tensor(torch.tensor([[3, 4], [5, 6]]))]
    rows = Concatenated(pieces, 0)
    assert rows.shape == (3, 2)
    assert rows.read(whole(rows.shape)).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert rows.read((slice(0, 2), slice(1, 2))).tolist() == [[2], [4]]
    assert rows.read((slice(2, 3), slice(0, 2))).tolist() == [[5, 6]]


def test_whole_block():
    assert whole((2, 3)) == (slice(0, 2), slice(0, 3))
