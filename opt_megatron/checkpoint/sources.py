"""Sources: tensors that can be read block by block, and how they are made of one another.

Everything is lazy. A source made of others computes which of their elements a block needs, and fetches
those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError

Block = tuple[slice, ...]  # one slice with a start and a stop per dimension, step 1
Fetch = Callable[[Block], Tensor]


@dataclass(frozen=True)
class Source:
    """One tensor that can be read in blocks.

    Attributes:
        fetch: gives a block, often as a view of a mapped file; it must not be written to.
        release: lets go of the memory that fetched blocks have touched; called when they are no longer used.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Fetch
    release: Callable[[], None] = lambda: None

    def read(self, block: Block | None = None) -> Tensor:
        """The elements in `block` (all of them by default), as a tensor of the block's shape."""
        return self.fetch(whole(self.shape) if block is None else block)


def whole(shape: tuple[int, ...]) -> Block:
    """The block that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def concatenated(pieces: list[Source], dim: int) -> Source:
    """One source made of pieces that follow each other along `dim`.

    Raises:
        CheckpointError: the pieces do not fit each other.
    """
    shape = list(pieces[0].shape)
    for number, piece in enumerate(pieces):
        others = [size for n, size in enumerate(piece.shape) if n != dim]
        if others != [size for n, size in enumerate(shape) if n != dim] or piece.dtype != pieces[0].dtype:
            raise CheckpointError(
                f"part {number} holds {list(piece.shape)} {piece.dtype} where part 0 holds {shape} {pieces[0].dtype}"
            )
    starts = []
    position = 0
    for piece in pieces:
        starts.append(position)
        position += piece.shape[dim]
    shape[dim] = position

    def fetch(block: Block) -> Tensor:
        parts = [
            piece.fetch(local)
            for piece, start in zip(pieces, starts, strict=True)
            for local in _overlap(block, dim, start, piece.shape[dim])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

    return Source(tuple(shape), pieces[0].dtype, fetch, lambda: _release_all(pieces))


def _overlap(block: Block, dim: int, start: int, size: int) -> Iterator[Block]:
    # The part of `block` that lies in a piece beginning at `start`, in the piece's own coordinates.
    first, stop = max(block[dim].start, start), min(block[dim].stop, start + size)
    if first < stop:
        yield (*block[:dim], slice(first - start, stop - start), *block[dim + 1 :])


def tensor_source(tensor: Tensor, release: Callable[[], None] = lambda: None) -> Source:
    """A source over a tensor that is in memory, or mapped from a file and read when touched."""
    return Source(tuple(tensor.shape), tensor.dtype, lambda block: tensor[block], release)


def row_range(source: Source, start: int, stop: int) -> Source:
    """The rows `start` to `stop` of a source, as a source."""

    def fetch(block: Block) -> Tensor:
        return source.fetch((slice(block[0].start + start, block[0].stop + start), *block[1:]))

    return Source((stop - start, *source.shape[1:]), source.dtype, fetch, source.release)


def replicated(copies: list[Source], name: str) -> Source:
    """One source for tensors that should be the same in every part; reading compares them.

    Raises (when it is read):
        CheckpointError: a copy differs, so the parts are not of one model.
    """
    first = copies[0]

    def fetch(block: Block) -> Tensor:
        values = first.fetch(block)
        for number, copy in enumerate(copies[1:], 1):
            if copy.shape != first.shape or not torch.equal(values, copy.fetch(block)):
                raise CheckpointError(f"{name} is not the same in parts 0 and {number}: they are not of one model")
        return values

    return Source(first.shape, first.dtype, fetch, lambda: _release_all(copies))


def flat_tensors(pieces: list[Source], shapes: dict[str, tuple[int, ...]]) -> dict[str, Source]:
    """Tensors that lie one after the other in a vector, which is itself cut into pieces.

    Args:
        pieces: 1-D sources that follow each other.
        shapes: names and shapes in the order in which they lie there; together as long as the vector.
    """
    vector = concatenated(pieces, 0)
    tensors, position = {}, 0
    for name, shape in shapes.items():
        tensors[name] = _tensor_in_vector(vector, position, shape)
        position += torch.Size(shape).numel()
    return tensors


def _tensor_in_vector(vector: Source, start: int, shape: tuple[int, ...]) -> Source:
    row_size = torch.Size(shape[1:]).numel()

    def fetch(block: Block) -> Tensor:
        first, stop = start + block[0].start * row_size, start + block[0].stop * row_size
        rows = vector.fetch((slice(first, stop),)).view(-1, *shape[1:])
        return rows[(slice(None), *block[1:])]

    return Source(shape, vector.dtype, fetch, vector.release)


def rows_of_zeros(count: int, like: Source) -> Source:
    """`count` rows of zeros, as wide as another source."""
    shape = (count, *like.shape[1:])
    return tensor_source(torch.zeros(shape, dtype=like.dtype))


def _release_all(sources: list[Source]) -> None:
    for source in sources:
        source.release()
