"""Sources: tensors that can be read block by block, and how they are made of one another.

Everything is lazy. A source made of others computes which of their elements a block needs, and fetches
those alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...errors import CheckpointError
from .blocks import Block


class LazyTensor(ABC):
    """One tensor that can be read in blocks.

    Attributes:
        shape: sizes. dtype: of its elements.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def num_elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Their size."""
        return self.num_elements * self.dtype.itemsize

    @abstractmethod
    def read(self, block: Block) -> Tensor:
        """The elements of a block, often as a view of a mapped file; they must not be written to."""

    @abstractmethod
    def release(self, block: Block) -> None:
        """Let go of the memory that fetching this block has touched; called when it is no longer used."""


class WrappedTensor(LazyTensor):
    """A tensor that is in memory, or mapped from a file and read when it is touched.

    Args:
        values: gives the tensor; release: lets go of the pages under a part of it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        values: Callable[[], Tensor],
        release: Callable[[Tensor], None] = lambda part: None,
    ) -> None:
        super().__init__(shape, dtype)
        self._values = values
        self._release = release

    def read(self, block: Block) -> Tensor:
        """A view."""
        return self._values()[block]

    def release(self, block: Block) -> None:
        """The pages under the view."""
        self._release(self._values()[block])


class Concatenated(LazyTensor):
    """Pieces that follow each other along `dim`.

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
        """A view where one piece holds the whole block, else a new tensor."""
        parts = [piece.read(local) for piece, local in self._overlaps(block)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._dim)

    def release(self, block: Block) -> None:
        """What the pieces hold of it."""
        for piece, local in self._overlaps(block):
            piece.release(local)

    def _overlaps(self, block: Block) -> Iterator[tuple[LazyTensor, Block]]:
        dim, wanted = self._dim, block[self._dim]
        for start, piece in self._placed:
            first, stop = max(wanted.start, start), min(wanted.stop, start + piece.shape[dim])
            if first < stop or wanted.start == wanted.stop == start:
                yield piece, (*block[:dim], slice(first - start, stop - start), *block[dim + 1 :])


class RemappedTensor(LazyTensor):
    """Some rows of another source, found by translating blocks of one into blocks of the other."""

    def __init__(self, source: LazyTensor, shape: Sequence[int]) -> None:
        super().__init__(shape, source.dtype)
        self._source = source

    @abstractmethod
    def _remap(self, block: Block) -> Block:
        """The block of the other source that holds this one's."""

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        """This source's block out of what the translated one holds."""
        return values

    def read(self, block: Block) -> Tensor:
        """A view where the other source gives one and its elements lie as they should."""
        return self._arrange(self._source.read(self._remap(block)), block)

    def release(self, block: Block) -> None:
        """The translated block."""
        self._source.release(self._remap(block))


class RowRange(RemappedTensor):
    """The rows `start` to `stop` of a source."""

    def __init__(self, source: LazyTensor, start: int, stop: int) -> None:
        super().__init__(source, (stop - start, *source.shape[1:]))
        self._start = start

    def _remap(self, block: Block) -> Block:
        return (slice(block[0].start + self._start, block[0].stop + self._start), *block[1:])


class FlatSlice(RemappedTensor):
    """A tensor that lies row by row in a vector, from element `start`."""

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
    """A tensor that should be the same in every part; fetching compares them."""

    def __init__(self, copies: Sequence[LazyTensor], name: str) -> None:
        super().__init__(copies[0].shape, copies[0].dtype)
        self._copies = copies
        self._name = name

    def read(self, block: Block) -> Tensor:
        """The first part's.

        Raises:
            CheckpointError: another part's differs.
        """
        values = self._copies[0].read(block)
        for number, copy in enumerate(self._copies[1:], 1):
            if copy.shape != self.shape or not bitwise_equal(values, copy.read(block)):
                parts = f"parts 0 and {number}"
                raise CheckpointError(f"{self._name} is not the same in {parts}: they are not of one model")
        return values

    def release(self, block: Block) -> None:
        """All of them."""
        for copy in self._copies:
            copy.release(block)


class Tied(LazyTensor):
    """A tensor that is stored a second time, as OPT's embedding is in the output head; fetching compares the two.

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
        """The first's.

        Raises:
            CheckpointError: the second's differs.
        """
        values = self._first.read(block)
        if not bitwise_equal(values, self._second.read(block)):
            raise CheckpointError(f"{self._what} differ; OPT ties the two")
        return values

    def release(self, block: Block) -> None:
        """Both."""
        self._first.release(block)
        self._second.release(block)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people and config files write it: float16, not torch.float16."""
    return str(dtype).removeprefix("torch.")


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape are equal to the bit (so a NaN equals itself, and -0 is not 0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def split_flat_vector(pieces: Sequence[LazyTensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """Tensors that lie one after the other in a vector, which is itself cut into pieces.

    Args:
        pieces: 1-D sources that follow each other.
        shapes: names and shapes in the order in which they lie there; together as long as the vector.
    """
    vector = Concatenated(pieces, 0)
    tensors: dict[str, LazyTensor] = {}
    position = 0
    for name, shape in shapes.items():
        tensors[name] = FlatSlice(vector, position, shape)
        position += torch.Size(shape).numel()
    return tensors


def wrap_tensor(tensor: Tensor) -> LazyTensor:
    """A source over a tensor that is in memory."""
    return WrappedTensor(tensor.shape, tensor.dtype, lambda: tensor)


def zero_rows(count: int, like: LazyTensor) -> LazyTensor:
    """`count` rows of zeros, as wide as another source."""
    return wrap_tensor(torch.zeros(count, *like.shape[1:], dtype=like.dtype))


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]
