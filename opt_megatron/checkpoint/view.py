"""The lazy view of a checkpoint that stands between every reader and every user of it.

A `Source` says what one canonical tensor is and fetches any block of it, touching only the bytes asked
for. Readers make sources; conversion, loading and verification read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import OPTConfig
from ..errors import CheckpointError, shorten
from .table import Split, canonical_shapes

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


@dataclass
class Checkpoint:
    """An opened checkpoint: its config and its canonical tensors, none of them read yet.

    Attributes:
        tensors: canonical name to source.
        format: what the files are, for people ("Hugging Face safetensors", "Megatron TP2 x PP1").
        bytes_read: bytes handed out so far, counted after slicing.
    """

    path: Path
    format: str
    config: OPTConfig
    tensors: dict[str, Source]
    bytes_read: int = 0

    def read(self, name: str, block: Block | None = None) -> Tensor:
        """One block of a canonical tensor.

        Raises:
            CheckpointError: the file turned out to be damaged.
        """
        try:
            tensor = self.tensors[name].read(block)
        except CheckpointError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def check_tensors(self) -> None:
        """Compare names and shapes with the config.

        Raises:
            CheckpointError: lists the unknown, the missing and the misshapen tensors by name.
        """
        wanted = canonical_shapes(self.config)
        missing = [name for name in wanted if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in wanted]
        misshapen = [
            f"{name} is {list(source.shape)}, the config says {list(wanted[name])}"
            for name, source in self.tensors.items()
            if name in wanted and source.shape != wanted[name]
        ]
        problems = [
            f"{len(names)} {what}: {shorten(names)}"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (misshapen, "misshapen"))
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.path}: the tensors do not fit config.json ({'; '.join(problems)}); "
                "use the files and the config of one model"
            )


def whole(shape: tuple[int, ...]) -> Block:
    """The block that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def rank_block(shape: tuple[int, ...], split: Split, rank: int, ranks: int) -> Block:
    """The block of a canonical tensor that belongs to tensor parallel rank `rank` of `ranks`."""
    block = list(whole(shape))
    if split.value is not None:
        size = shape[split.value] // ranks
        block[split.value] = slice(rank * size, (rank + 1) * size)
    return tuple(block)


def concatenated(pieces: list[Source], dim: int) -> Source:
    """One source made of pieces that follow each other along `dim`."""
    shape = list(pieces[0].shape)
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

    def release() -> None:
        for piece in pieces:
            piece.release()

    return Source(tuple(shape), pieces[0].dtype, fetch, release)


def _overlap(block: Block, dim: int, start: int, size: int) -> Iterator[Block]:
    # The part of `block` that lies in a piece beginning at `start`, in the piece's own coordinates.
    first, stop = max(block[dim].start, start), min(block[dim].stop, start + size)
    if first < stop:
        yield (*block[:dim], slice(first - start, stop - start), *block[dim + 1 :])


def tensor_source(tensor: Tensor, release: Callable[[], None] = lambda: None) -> Source:
    """A source over a tensor that is in memory, or mapped from a file and read when touched."""
    return Source(tuple(tensor.shape), tensor.dtype, lambda block: tensor[block], release)
