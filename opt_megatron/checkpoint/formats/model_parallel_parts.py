"""Model-parallel parts joined into whole tensors: what metaseq's and FlagAI's readers share."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from ...errors import CheckpointError, shorten
from ..parameter_mapping import PREFIX, split_of
from ..storage.blocks import whole
from ..storage.lazy_tensor import Concatenated, LazyTensor, Replicated

_OWN_SLICE = PREFIX + "layers.0.fc1.weight"


def join_parts(parts: list[dict[str, LazyTensor]], path: Path) -> dict[str, LazyTensor]:
    """Canonical tensors out of the parts' slices of them, by the parameter table's split rules.

    Raises:
        CheckpointError: the parts do not hold the same tensors, or slices that do not fit each other.
    """
    for number, part in enumerate(parts[1:], 1):
        different = sorted(parts[0].keys() ^ part.keys())
        if different:
            raise CheckpointError(f"{path}: parts 0 and {number} hold different tensors: {shorten(different)}")
    if _OWN_SLICE in parts[0]:
        check_no_duplicates([part[_OWN_SLICE] for part in parts], f"{path}: parts")
    return {name: _joined(name, [part[name] for part in parts], path) for name in parts[0]}


def missing_from_grid(found: Collection[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows and columns of the smallest grid that holds all places, and the first few places that are empty.

    A file name alone may claim a part number in the billions, so the grid is never made.
    """
    rows, columns = 1 + max(row for row, _ in found), 1 + max(column for _, column in found)
    places = ((row, column) for row in range(rows) for column in range(columns))
    empty = (place for place in places if place not in found) if rows * columns > len(found) else iter(())
    return rows, columns, list(itertools.islice(empty, 9))


def check_no_duplicates(slices: Sequence[LazyTensor], where: str) -> None:
    """Refuse slices of which two are the same, as when one part was copied over another.

    Compares a few rows of a matrix that every part has its own slice of; rows of zeros tell nothing.

    Raises:
        CheckpointError: names the two.
    """
    seen: dict[bytes, int] = {}
    for number, source in enumerate(slices):
        rows = source.read((slice(0, min(4, source.shape[0])), *whole(source.shape)[1:])).float()
        content = rows.contiguous().numpy().tobytes()
        if rows.any() and content in seen:
            raise CheckpointError(f"{where} {seen[content]} and {number} hold the same slice: one is there twice")
        seen[content] = number


def _joined(name: str, slices: list[LazyTensor], path: Path) -> LazyTensor:
    if len(slices) == 1:
        return slices[0]
    dim = split_of(name).value
    try:
        return Replicated(slices, name) if dim is None else Concatenated(slices, dim)
    except (CheckpointError, IndexError) as error:
        raise CheckpointError(f"{path}: {name}: {error}; the parts are not of one model") from None
