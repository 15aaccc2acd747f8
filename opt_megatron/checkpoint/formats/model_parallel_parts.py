"""Joins model-parallel parts into whole tensors; metaseq's, FlagAI's and Megatron's readers use it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import CheckpointError, shorten
from ..parameter_mapping import PREFIX, split_of
from ..storage.blocks import Block, whole
from ..storage.lazy_tensor import Concatenated, LazyTensor, Replicated

_SPLIT_MATRICES = [f"{PREFIX}layers.0.{name}.weight" for name in ("fc1", "fc2", "self_attn.out_proj")]


def join_parts(parts: list[dict[str, LazyTensor]], path: Path) -> dict[str, LazyTensor]:
    """Whole canonical tensors from the parts' slices, joined as the parameter mapping says they are split.

    Args:
        parts: canonical name -> slice, for each part.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: the parts do not hold the same tensors, or slices that do not fit each other.
    """
    for number, part in enumerate(parts[1:], 1):
        different = sorted(parts[0].keys() ^ part.keys())
        if different:
            raise CheckpointError(f"{path}: parts 0 and {number} hold different tensors: {shorten(different)}")
    check_no_duplicates([[part[name] for name in _SPLIT_MATRICES if name in part] for part in parts], f"{path}: parts")
    return {name: _joined(name, [part[name] for part in parts], path) for name in parts[0]}


def missing_from_grid(found: Collection[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows and columns of the smallest grid that holds all found (row, column), and the first few empty cells.

    A file name may claim a part number in the billions, so the grid is never built.
    """
    rows, columns = 1 + max(row for row, _ in found), 1 + max(column for _, column in found)
    cells = ((row, column) for row in range(rows) for column in range(columns))
    empty = (cell for cell in cells if cell not in found) if rows * columns > len(found) else iter(())
    return rows, columns, list(itertools.islice(empty, 9))


def check_no_duplicates(parts: Sequence[Sequence[LazyTensor]], where: str) -> None:
    """Check that no two parts are the same, as when one was copied over another.

    Args:
        parts: of each, its slices of the same split matrices. Only a few rows are compared. Several matrices, because
            one that somebody has edited may have equal slices (all ones, for example); zeros alone are passed over.
        where: the beginning of the message.

    Raises:
        CheckpointError: two are the same; it says which.
    """
    seen: dict[bytes, int] = {}
    for number, slices in enumerate(parts):
        rows = [tensor.read(_first_rows(tensor)).float() for tensor in slices]
        content = b"".join(matrix.contiguous().numpy().tobytes() for matrix in rows)
        if any(matrix.any() for matrix in rows) and content in seen:
            raise CheckpointError(f"{where} {seen[content]} and {number} hold the same slice: one is there twice")
        seen.setdefault(content, number)


def _first_rows(tensor: LazyTensor) -> Block:
    return tuple(slice(0, min(4, size)) for size in tensor.shape[:1]) + whole(tensor.shape)[1:]


def _joined(name: str, slices: list[LazyTensor], path: Path) -> LazyTensor:
    if len(slices) == 1:
        return slices[0]
    dim = split_of(name).value
    try:
        return Replicated(slices, name) if dim is None else Concatenated(slices, dim)
    except (CheckpointError, IndexError) as error:
        raise CheckpointError(f"{path}: {name}: {error}; the parts are not of one model") from None
