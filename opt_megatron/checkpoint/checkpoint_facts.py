"""What tells one checkpoint from another without reading all of it, in whatever format and wherever it is."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import xxhash

from ..errors import CheckpointError
from .adapter import Adapter
from .checkpoint import Checkpoint
from .manifest import comparable_config
from .storage.blocks import Block
from .storage.lazy_tensor import LazyTensor

_COLUMNS = 64  # of the rows that are read of each tensor


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """The config's values, and what `_tensor_facts` says of the tensors, by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = checkpoint.config
    values = comparable_config(config) | {"dtype": config.dtype}
    return {name: str(value) for name, value in values.items()} | _tensor_facts(checkpoint.tensors)


def facts_digest(checkpoint: Checkpoint) -> str:
    """A hash of `checkpoint_facts`."""
    return xxhash.xxh3_128_hexdigest(json.dumps(checkpoint_facts(checkpoint), sort_keys=True).encode())


def adapter_facts(adapter: Adapter) -> dict[str, str]:
    """What `_tensor_facts` says of the factors, by the name of their weight, and their scales."""
    facts: dict[str, str] = {}
    for name, factors in adapter.factors.items():
        facts |= {f"LoRA's scale of {name}": str(factors.scale)}
        facts |= _tensor_facts({f"LoRA's A of {name}": factors.a, f"LoRA's B of {name}": factors.b})
    return facts


def _tensor_facts(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Shape, dtype and a hash of the first, a middle and the last row.

    Rows are enough: whatever changes a model (training, another seed, another scale) changes all rows of most tensors.
    """
    facts = {}
    for name, tensor in tensors.items():
        digest = xxhash.xxh3_64()
        for block in _sampled_blocks(tensor):
            digest.update(_bytes_of(tensor, block, name))
        facts[name] = f"{list(tensor.shape)} {tensor.dtype}, values {digest.hexdigest()}"
    return facts


def _bytes_of(tensor: LazyTensor, block: Block, name: str) -> memoryview:
    try:
        return tensor.read(block).contiguous().view(torch.uint8).numpy().data
    except CheckpointError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error


def _sampled_blocks(tensor: LazyTensor) -> list[Block]:
    rows, *columns = tensor.shape
    widths = tuple(slice(0, min(size, _COLUMNS)) for size in columns)
    return [(slice(row, row + 1), *widths) for row in sorted({0, rows // 2, rows - 1})]
