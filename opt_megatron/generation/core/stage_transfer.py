"""What a pipeline stage passes on in a step: hidden states to the next one, and at the end the output to the first.

T = tokens of the step, H = hidden size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.context import LEADER, ParallelContext


class StageTransfer:
    """The transfers of this rank; every rank exchanges with those that have the same part of the tensors.

    Args:
        tokens_are_kept: all ranks of the first stage get the chosen tokens, not the leader alone.
    """

    def __init__(self, parallel: ParallelContext, hidden_size: int, dtype: torch.dtype, tokens_are_kept: bool) -> None:
        self._parallel, self._hidden_size, self._dtype = parallel, hidden_size, dtype
        self._gets_tokens = parallel.is_leader or (tokens_are_kept and parallel.is_first_stage)
        self._gives_tokens = parallel.rank == parallel.logits_rank or tokens_are_kept

    def receive_hidden(self, count: int) -> Tensor:
        """[T, H] from the previous stage."""
        hidden = torch.empty(count, self._hidden_size, dtype=self._dtype, device=self._parallel.device)
        dist.recv(hidden, self._parallel.rank - self._parallel.pipeline_stride)
        return hidden

    def send_hidden(self, hidden: Tensor) -> None:
        """[T, H] to the next stage."""
        dist.send(hidden.contiguous(), self._parallel.rank + self._parallel.pipeline_stride)

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage to the first, if there are others."""
        if not self._parallel.is_first_stage and self._gives_tokens and len(tokens):
            dist.send(tokens, self._parallel.rank - self._parallel.logits_rank)

    def receive_tokens(self, count: int) -> Tensor:
        """[count] int64 from the last stage; on ranks that get none their values have no meaning."""
        tokens = torch.zeros(count, dtype=torch.int64, device=self._parallel.device)
        if self._gets_tokens and count:
            dist.recv(tokens, self._parallel.rank + self._parallel.logits_rank)
        return tokens

    def send_rows(self, rows: Tensor) -> None:
        """From the last stage to the leader, if that is another rank."""
        if not self._parallel.is_first_stage and self._parallel.rank == self._parallel.logits_rank and len(rows):
            dist.send(rows.contiguous(), LEADER)

    def receive_rows(self, count: int, width: int) -> Tensor:
        """[count, width] float32 on the leader; elsewhere the values have no meaning."""
        rows = torch.empty(count, width, dtype=torch.float32, device=self._parallel.device)
        if self._parallel.is_leader and count:
            dist.recv(rows, self._parallel.logits_rank)
        return rows
