"""One model-parallel part of metaseq's: unflattened, or FSDP groups of parameters that are flat vectors.

An FSDP group is one vector, "flat_param_0" under the group's path. Each shard file holds an equal piece of it,
the last ones padded at their end, and `shard_metadata` says which tensors the vector consists of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import CheckpointError
from ..storage.lazy_tensor import LazyTensor, RowRange, split_flat_vector
from ..storage.torch_reader import TorchFile

FLAT_PARAMETER = "flat_param_0"


@dataclass(frozen=True)
class _FlatGroup:
    """The tensors of an FSDP group in their order within the vector, and the padding of one shard's piece."""

    shapes: dict[str, tuple[int, ...]]
    padding: int


def read_part(shards: list[TorchFile]) -> dict[str, LazyTensor]:
    """One part's tensors under metaseq's names.

    Args:
        shards: the part's files, a single one if it is not sharded.

    Raises:
        CheckpointError: a shard's metadata is missing or does not fit what is in the files.
    """
    models = [_model(shard) for shard in shards]
    if not any(name.endswith(FLAT_PARAMETER) for name in models[0]):
        if len(shards) > 1:
            raise CheckpointError(f"{shards[0].path}: is one of {len(shards)} shards, but its tensors are not flat")
        return models[0]
    groups = [_groups(shard) for shard in shards]
    tensors: dict[str, LazyTensor] = {}
    for path in groups[0]:
        tensors |= _unflatten(path, shards, models, groups)
    return tensors | {name: tensor for name, tensor in models[0].items() if not name.endswith(FLAT_PARAMETER)}


def _model(shard: TorchFile) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in shard.model("metaseq").items() if name != "decoder.version"}


def _unflatten(
    path: str, shards: list[TorchFile], models: list[dict[str, LazyTensor]], groups: list[dict[str, _FlatGroup]]
) -> dict[str, LazyTensor]:
    """The tensors of one group, as parts of the vector that its pieces make up."""
    key = f"{path}.{FLAT_PARAMETER}" if path else FLAT_PARAMETER
    pieces: list[LazyTensor] = []
    for shard, model, group in zip(shards, models, groups, strict=True):
        if key not in model or path not in group:
            raise CheckpointError(f"{shard.path}: has no {key}, which the first shard has")
        pieces.append(RowRange(model[key], 0, model[key].shape[0] - group[path].padding))
    shapes = groups[0][path].shapes
    have, want = sum(piece.shape[0] for piece in pieces), sum(map(math.prod, shapes.values()))
    if have != want:
        raise CheckpointError(
            f"{shards[0].path.parent}: the {len(shards)} shards that are here hold {have:,} of the {want:,} elements "
            f"of {key}; shards are missing or of another checkpoint"
        )
    prefix = f"{path}." if path else ""
    named = {prefix + name.removeprefix(prefix): shape for name, shape in shapes.items()}
    return split_flat_vector(pieces, named)


def _groups(shard: TorchFile) -> dict[str, _FlatGroup]:
    """FSDP path -> group."""
    try:
        entries = shard.content["shard_metadata"]["param_metadata"]
        groups = {}
        for entry in entries:
            flat = entry["params"][FLAT_PARAMETER]
            shapes = {name: tuple(shape) for name, shape in zip(flat["names"], flat["shapes"], strict=True)}
            padding = flat["padding"]
            numbers = [padding, *(size for shape in shapes.values() for size in shape)]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise TypeError("sizes that are not numbers")
            groups[str(entry["fsdp_path"])] = _FlatGroup(shapes, padding)
        return groups
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{shard.path}: holds flat parameters, and its shard_metadata does not say what is in them "
            f"({type(error).__name__})"
        ) from None
