"""Blocks: rectangular parts of tensors. Apart from torch, so that planning with them takes no time to import."""

from __future__ import annotations

Block = tuple[slice, ...]  # one slice with a start and a stop per dimension, step 1


def whole(shape: tuple[int, ...]) -> Block:
    """The block that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)
