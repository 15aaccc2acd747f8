"""Initial values that a seed and a name determine, so that they can be made again wherever they are needed."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def initial_lora_a(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """The whole first A [rank, inputs] of a layer, in float32: uniform in +-1 / sqrt(inputs), as in nn.Linear (Kaiming
    with a = sqrt(5)).

    Args:
        name: of the layer, numbered as in the whole model.
    """
    generator = torch.Generator().manual_seed(tensor_seed(f"{name}.lora_a", 0, seed))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def tensor_seed(name: str, block: int, seed: int) -> int:
    """The seed of a block of a tensor in a run of this seed."""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
