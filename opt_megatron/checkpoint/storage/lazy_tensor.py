"""Lazy tensors: tensors that are read block by block, and how they are composed of one another.

A lazy tensor that is composed of others works out which of their elements a block needs, and reads only those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import CheckpointError
from .blocks import Block

_MODULE = "module."


class LazyTensor(ABC):
    """A tensor that is read in blocks.

    Attributes:
        shape: its sizes.
        dtype: the type of its elements.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the elements in bytes."""
        return self.num_elements * self.dtype.itemsize

    @abstractmethod
    def read(self, block: Block) -> Tensor:
        """The elements of a block, [sizes of the block]; it may be a view of a tensor in memory: do not write to it.

        They are in `dtype`, or in a wider one where they are computed.
        """


class WrappedTensor(LazyTensor):
    """A torch tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self._tensor = tensor

    def read(self, block: Block) -> Tensor:
        """A view of the tensor."""
        return self._tensor[block]


class Concatenated(LazyTensor):
    """Pieces that are joined along `dim`.

    Raises:
        CheckpointError: the pieces do not fit each other.
    """

    def __init__(self, pieces: Sequence[LazyTensor], dim: int) -> None:
        first, shape = pieces[0], list(pieces[0].shape)
        shape[dim] = sum(piece.shape[dim] for piece in pieces)
        super().__init__(shape, first.dtype)
        self._dim = dim
        self._placed: list[tuple[int, LazyTensor]] = []
        start = 0
        for number, piece in enumerate(pieces):
            if _without(piece.shape, dim) != _without(first.shape, dim) or piece.dtype != first.dtype:
                theirs, ours = f"{list(piece.shape)} {piece.dtype}", f"{list(first.shape)} {first.dtype}"
                raise CheckpointError(f"part {number} holds {theirs} where part 0 holds {ours}")
            self._placed.append((start, piece))
            start += piece.shape[dim]

    def read(self, block: Block) -> Tensor:
        """A view if one piece holds the whole block, else a new tensor."""
        parts = [piece.read(local) for piece, local in self._overlaps(block)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._dim)

    def _overlaps(self, block: Block) -> Iterator[tuple[LazyTensor, Block]]:
        dim, wanted = self._dim, block[self._dim]
        for start, piece in self._placed:
            first, stop = max(wanted.start, start), min(wanted.stop, start + piece.shape[dim])
            if first < stop or wanted.start == wanted.stop == start:
                yield piece, (*block[:dim], slice(first - start, stop - start), *block[dim + 1 :])


class RemappedTensor(LazyTensor):
    """Elements of another tensor: each block of this one is computed from a block of the other.

    Args:
        base: the other tensor.
        shape: of this one.
    """

    def __init__(self, base: LazyTensor, shape: Sequence[int]) -> None:
        super().__init__(shape, base.dtype)
        self._base = base

    @abstractmethod
    def _remap(self, block: Block) -> Block:
        """The block of the base that holds the elements of this tensor's `block`."""

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        """The elements of this tensor's `block` from the values of the base's block."""
        return values

    def read(self, block: Block) -> Tensor:
        """A view if the base returns one and `_arrange` copies nothing."""
        return self._arrange(self._base.read(self._remap(block)), block)


class RowRange(RemappedTensor):
    """The rows `start` to `stop` of another tensor."""

    def __init__(self, base: LazyTensor, start: int, stop: int) -> None:
        super().__init__(base, (stop - start, *base.shape[1:]))
        self._start = start

    def _remap(self, block: Block) -> Block:
        return (slice(block[0].start + self._start, block[0].stop + self._start), *block[1:])


class ColumnRange(RemappedTensor):
    """The columns `start` to `stop` of a matrix."""

    def __init__(self, base: LazyTensor, start: int, stop: int) -> None:
        super().__init__(base, (base.shape[0], stop - start))
        self._start = start

    def _remap(self, block: Block) -> Block:
        return (block[0], slice(block[1].start + self._start, block[1].stop + self._start))


class FlatSlice(RemappedTensor):
    """A tensor that is stored row by row in a vector, from element `start`."""

    def __init__(self, vector: LazyTensor, start: int, shape: Sequence[int]) -> None:
        super().__init__(vector, shape)
        self._start = start
        self._row_size = torch.Size(self.shape[1:]).numel()

    def _remap(self, block: Block) -> Block:
        first, stop = (self._start + row * self._row_size for row in (block[0].start, block[0].stop))
        return (slice(first, stop),)

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        return values.view(block[0].stop - block[0].start, *self.shape[1:])[(slice(None), *block[1:])]


class Replicated(LazyTensor):
    """A tensor that must be the same in every part; reading compares the copies."""

    def __init__(self, copies: Sequence[LazyTensor], name: str) -> None:
        super().__init__(copies[0].shape, copies[0].dtype)
        self._copies = copies
        self._name = name

    def read(self, block: Block) -> Tensor:
        """The first copy's elements.

        Raises:
            CheckpointError: another copy differs.
        """
        values = self._copies[0].read(block)
        for number, copy in enumerate(self._copies[1:], 1):
            if copy.shape != self.shape or not bitwise_equal(values, copy.read(block)):
                parts = f"parts 0 and {number}"
                raise CheckpointError(f"{self._name} is not the same in {parts}: they are not of one model")
        return values


class Tied(LazyTensor):
    """A tensor that is stored twice, as OPT's embedding is in the output head; reading compares the two.

    Args:
        what: names both in messages.

    Raises:
        CheckpointError: their shapes differ.
    """

    def __init__(self, first: LazyTensor, second: LazyTensor, what: str) -> None:
        super().__init__(first.shape, first.dtype)
        self._first, self._second, self._what = first, second, what
        if first.shape != second.shape:
            shapes = f"{list(first.shape)} and {list(second.shape)}"
            raise CheckpointError(f"{what} have the shapes {shapes}; OPT ties the two")

    def read(self, block: Block) -> Tensor:
        """The first one's elements.

        Raises:
            CheckpointError: the second one differs.
        """
        values = self._first.read(block)
        if not bitwise_equal(values, self._second.read(block)):
            raise CheckpointError(f"{self._what} differ; OPT ties the two")
        return values


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape are equal to the bit (so a NaN equals itself, and -0 is not 0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def split_flat_vector(pieces: Sequence[LazyTensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """The tensors that are stored one after another in a vector, which is itself stored in pieces.

    Args:
        pieces: 1-D tensors that make up the vector.
        shapes: names and shapes in the order in which they are stored; together as long as the vector.
    """
    vector = Concatenated(pieces, 0)
    tensors: dict[str, LazyTensor] = {}
    position = 0
    for name, shape in shapes.items():
        tensors[name] = FlatSlice(vector, position, shape)
        position += torch.Size(shape).numel()
    return tensors


def wrap_tensor(tensor: Tensor) -> LazyTensor:
    """A lazy tensor for a tensor in memory."""
    return WrappedTensor(tensor)


def zero_rows(count: int, like: LazyTensor) -> LazyTensor:
    """[count, ...] of zeros, with the columns and the dtype of another tensor."""
    return wrap_tensor(torch.zeros(count, *like.shape[1:], dtype=like.dtype))


def without_module_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors without the `module.` that torch's DistributedDataParallel puts before every name of its model."""
    if not all(name.startswith(_MODULE) for name in tensors):
        return tensors
    return {name.removeprefix(_MODULE): tensor for name, tensor in tensors.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements; those of the tensor itself if it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]
