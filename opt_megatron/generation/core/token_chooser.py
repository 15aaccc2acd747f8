"""The choice of tokens within a step, on the last pipeline stage: of all rows at once, on the device.

R = rows, V = vocabulary, v = vocabulary rows of this tensor parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import OPTConfig
from ...parallel.collectives import Collectives
from ...parallel.context import ParallelContext
from ..sampling.batch_sampler import SamplingTensors, argmax_rows, sample_rows


class TokenChooser:
    """Chooses the same tokens on every tensor parallel rank, from its part of the logits.

    Args:
        suppressed: [ids] int64 that are never chosen.

    Attributes:
        vocab_size: V.
    """

    def __init__(
        self, config: OPTConfig, parallel: ParallelContext, collectives: Collectives, suppressed: Tensor
    ) -> None:
        self._collectives, self.vocab_size = collectives, config.vocab_size
        ranks = parallel.tensor_model_parallel_size
        num_rows = config.padded_vocab_size(ranks) // ranks
        self._first_row = parallel.tensor_model_parallel_rank * num_rows
        self._is_divided = ranks > 1
        own = suppressed - self._first_row
        self._suppressed = suppressed.to(parallel.device)
        self._suppressed_here = own[(own >= 0) & (own < num_rows)].to(parallel.device)

    def greedy(self, local: Tensor) -> Tensor:
        """The first of the best ids, [R], of logits [R, v]."""
        if not self._is_divided:
            return argmax_rows(local, self._suppressed)
        index = argmax_rows(local, self._suppressed_here)
        value = local.gather(1, index[:, None]).squeeze(1)
        own = torch.stack(((index + self._first_row).double(), value.double()), dim=-1)  # [R, 2]; ids are exact
        every = self._collectives.all_gather(own).unflatten(-1, (-1, 2))  # [R, ranks, 2]
        winner = every[..., 1].argmax(-1, keepdim=True)  # of equal ones the first, hence the lowest ids
        return every[..., 0].gather(1, winner).squeeze(1).long()

    def sampled(self, local: Tensor, rows: SamplingTensors, numbers: Tensor, green: Tensor | None = None) -> Tensor:
        """The ids [R], of logits [R, v], by options, random numbers [R] float64, and green lists if there are any."""
        return sample_rows(self.gather(local), rows, numbers, self._suppressed, green)

    def gather(self, local: Tensor) -> Tensor:
        """Logits of the whole vocabulary, [R, v] -> [R, V]."""
        return self._collectives.all_gather(local)[:, : self.vocab_size]
