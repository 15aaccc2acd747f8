"""Blocks: rectangular parts of tensors. Imports no torch, so that estimates that use them start at once."""

from __future__ import annotations

import math

# Of rows that are read at once: small enough that they are still in the processor's cache when they are written or
# copied (measured on Linux 6.18, ext4).
BLOCK_BYTES = 4 * 2**20

Block = tuple[slice, ...]  # one slice with a start and a stop per dimension, step 1


def whole(shape: tuple[int, ...]) -> Block:
    """The block that covers a tensor of this shape."""
    return tuple(slice(0, size) for size in shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of this shape that is stored row by row."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def block_shape(block: Block) -> tuple[int, ...]:
    """The sizes of a block."""
    return tuple(s.stop - s.start for s in block)
