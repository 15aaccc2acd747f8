"""The KV cache's interface, and the choice of the implementation that is fast for a device and a dtype.

A sequence owns consecutive blocks of the cache, for as many tokens as it can ever need. Nothing outside its own tokens
affects it: memory need not be cleared, and a sequence is shortened by overwriting its end.

T = tokens of the step, n = attention heads of this tensor parallel rank, d = head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...errors import UserError
from ...model.cpu_kernels import FORMATS, library
from ..step import KVCacheBlocks, ScheduledSequence
from .cpu_kv_cache import CPUKVCache
from .paged_kv_cache import PagedKVCache


class KVCache(Protocol):
    """The cache of one model on this rank, and the attention over it (`incremental_forward.AttentionBackend`).

    Attributes:
        num_tokens: that it has memory for.
    """

    num_tokens: int

    def prepare_step(self, sequences: tuple[ScheduledSequence, ...]) -> Tensor:
        """Compute what all layers share in a step.

        Returns:
            positions [T]
        """

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """Store this step's keys and values, and attend.

        Args:
            layer: from 0 within the stage.
            query_key_value: [T, n, 3, d]

        Returns:
            softmax(q d**-0.5 k^T) v of every token over its own sequence so far, [T, n * d]
        """

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of one sequence's blocks to another's, in all layers."""


def cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The cache's dtype for a model of `dtype`.

    Args:
        name: of --kv-cache-dtype. "auto" is the model's, without the kernels of csrc/ float32 on a CPU.

    Raises:
        UserError: this machine has no cache in that dtype.
    """
    has_kernels = library() is not None
    if name == "auto":
        return torch.float32 if device.type == "cpu" and not (has_kernels and dtype in FORMATS) else dtype
    wanted: torch.dtype = getattr(torch, name)
    if device.type == "cpu" and wanted != torch.float32 and not has_kernels:
        raise UserError(f"--kv-cache-dtype {name} needs the CPU kernels, which are not there: give auto or float32")
    if device.type != "cpu" and wanted != dtype:
        raise UserError(f"--kv-cache-dtype {name}: on a GPU the cache has the model's dtype, {dtype}; give auto")
    return wanted


def make_kv_cache(
    num_layers: int, num_heads: int, head_dim: int, num_tokens: int, *, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache for `num_tokens` tokens, a multiple of BLOCK_SIZE, in the layers and heads of this rank.

    Args:
        dtype: of the cache (`cache_dtype`).
    """
    if device.type == "cpu":
        return CPUKVCache(num_layers, num_heads, head_dim, num_tokens, dtype=dtype)
    return PagedKVCache(num_layers, num_heads, head_dim, num_tokens, dtype=dtype, device=device)


def cache_bytes_per_token(num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in a cache of `dtype`; in 8 bits each has a scale for every head."""
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * num_layers * num_heads * (head_dim * dtype.itemsize + scale)
