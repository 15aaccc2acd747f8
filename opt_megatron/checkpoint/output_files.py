"""The weight files of a conversion, described before a byte is written.

A format describes each of its files as an `OutputFile`: for every stored tensor its name, shape and dtype, and
the blocks of canonical tensors that its bytes consist of. `write.py` creates the files and writes the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .storage.blocks import Block, block_shape

DtypeOf = Callable[[str], torch.dtype]  # canonical name -> dtype in the output


@dataclass(frozen=True)
class SourceBlock:
    """A block of the canonical tensor `name`, stored row by row from element `start` of a stored tensor."""

    name: str
    block: Block
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an output file, made of blocks of canonical tensors, or a constant."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[SourceBlock, ...]
    constant: Tensor | None = None

    @classmethod
    def of_block(cls, stored_name: str, canonical: str, block: Block, dtype: torch.dtype) -> StoredTensor:
        """A tensor that is one block of a canonical one."""
        return cls(stored_name, block_shape(block), dtype, (SourceBlock(canonical, block),))

    def with_rows(self, rows: int) -> StoredTensor:
        """The same with this many rows, of which those after the block are zeros."""
        return replace(self, shape=(rows, *self.shape[1:]))

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """One file to write.

    Attributes:
        path: relative to the target directory.
        wrap: for kind "torch", makes the object to save from {name: tensor}.
    """

    path: Path
    kind: Literal["torch", "safetensors"]
    tensors: tuple[StoredTensor, ...]
    wrap: Callable[[dict[str, Any]], Any] = field(default=lambda tensors: tensors)

    @property
    def num_bytes(self) -> int:
        """Size of its tensors' data."""
        return sum(stored.num_bytes for stored in self.tensors)
