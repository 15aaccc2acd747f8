"""Attention of single queries over the KV cache by the kernels of csrc/, all queries of a step in one call a layer.

Q = queries of a step, n = attention heads of this rank, d = head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.cpu_kernels import CachedKeysValues, CPUKernels


class CPUKernelAttention:
    """The queries of one step, each of which is the newest token, or one of the newest few, of its sequence.

    Args:
        queries: (index among the step's tokens, first block of the sequence, position in the sequence) of each.

    Attributes:
        tokens: [Q], indices among the step's tokens.
    """

    def __init__(self, queries: list[tuple[int, int, int]], kernels: CPUKernels) -> None:
        self.tokens, self._first_blocks, self._positions = torch.tensor(queries).T.contiguous()  # [Q]
        self._kernels = kernels

    def attend(self, query_key_value: Tensor, cache: CachedKeysValues, scale: float) -> Tensor:
        """Store and attend: [Q, n, 3, d] -> [Q, n * d]."""
        return self._kernels.attend(query_key_value, cache, self._first_blocks, self._positions, scale)
