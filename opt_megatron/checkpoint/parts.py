"""Model-parallel parts joined into whole tensors: what metaseq's and FlagAI's readers share."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, shorten
from .sources import Concatenated, Replicated, Source
from .table import split_of


def join_parts(parts: list[dict[str, Source]], path: Path) -> dict[str, Source]:
    """Canonical tensors out of the parts' slices of them, by the parameter table's split rules.

    Raises:
        CheckpointError: the parts do not hold the same tensors, or slices that do not fit each other.
    """
    for number, part in enumerate(parts[1:], 1):
        different = sorted(parts[0].keys() ^ part.keys())
        if different:
            raise CheckpointError(f"{path}: parts 0 and {number} hold different tensors: {shorten(different)}")
    return {name: _joined(name, [part[name] for part in parts], path) for name in parts[0]}


def _joined(name: str, slices: list[Source], path: Path) -> Source:
    if len(slices) == 1:
        return slices[0]
    dim = split_of(name).value
    try:
        return Replicated(slices, name) if dim is None else Concatenated(slices, dim)
    except (CheckpointError, IndexError) as error:
        raise CheckpointError(f"{path}: {name}: {error}; the parts are not of one model") from None
