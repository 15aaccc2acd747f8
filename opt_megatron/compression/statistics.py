"""What the methods need to know of a linear layer's inputs, summed over calibration samples on any layout.

I = inputs, s = tokens of a sample. A tensor parallel rank sums its columns of the second moments, and the ranks gather
them at the end. Sums are kept in float64, so that neither the number of ranks nor the order of samples changes a bit of
what is made of them but in the rarest case.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..parallel.context import ParallelContext
from .decoder_layer import RowRanks

_MIRRORED = 512  # columns that are copied at once


class InputStatistics:
    """Statistics of what one or more linears read; `add` every sample of this rank, then `finish`, then read.

    Args:
        with_hessian: sum the second moments, too.
        columns_at_once: of them, in a product; one that every layout divides by makes the same products at each.

    Attributes (whole after `finish`):
        samples: number of them.
        tokens: of all samples.
        largest: float32 [I], the largest |x_j|.
        squared_norms: float64 [I], sum of x_j^2 over the tokens.
        positive: int64 [I], tokens with x_j > 0 (of fc2: for which the neuron fires).
        hessian: float64 [I, I], A = (2 / samples) sum x x^T; None if it is not wanted.
    """

    def __init__(
        self, num_inputs: int, ranks: RowRanks, device: torch.device, *, with_hessian: bool, columns_at_once: int
    ) -> None:
        self._ranks, self._own, self._columns = ranks, ranks.own(num_inputs), columns_at_once
        self.samples = self.tokens = 0
        self.largest = torch.zeros(num_inputs, device=device)
        self.squared_norms = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.positive = torch.zeros(num_inputs, dtype=torch.int64, device=device)
        self.hessian: Tensor | None = None
        if with_hessian:
            own_columns = self._own.stop - self._own.start
            self.hessian = torch.zeros(num_inputs, own_columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add the inputs of one sample, [s, I]."""
        self.samples += 1
        self.tokens += len(x)
        torch.maximum(self.largest, x.abs().amax(0), out=self.largest)
        self.squared_norms += torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square_()
        self.positive += (x > 0).sum(0)
        if self.hessian is not None:
            for start in range(self._own.start, self._own.stop, self._columns):
                stop = min(start + self._columns, self._own.stop)
                sums = self.hessian[:stop, start - self._own.start : stop - self._own.start]
                sums += x[:, :stop].t() @ x[:, start:stop]  # the rest follows from the symmetry

    def finish(self, parallel: ParallelContext) -> None:
        """Add what the other ranks have; called once, on all ranks of a pipeline stage."""
        if parallel.data_parallel_size > 1:
            self._sum_over_data_parallel_ranks()
        if self.hessian is not None:
            self.hessian *= 2 / self.samples
            self.hessian = self._ranks.gather(self.hessian)
            _mirror(self.hessian)

    def _sum_over_data_parallel_ranks(self) -> None:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
        counts = torch.tensor([self.samples, self.tokens], device=self.largest.device)
        for sums in (counts, self.squared_norms, self.positive, self.hessian):
            if sums is not None:
                dist.all_reduce(sums, group=group)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, group=group)
        self.samples, self.tokens = counts.tolist()

    @property
    def firing(self) -> float:
        """Share of all inputs of all tokens that are above zero."""
        return float(self.positive.sum()) / (self.tokens * len(self.positive))

    def check_finite(self, what: str) -> None:
        """Raise UserError, which names `what` has these inputs, if one of them was not a finite number."""
        broken = int((~self.squared_norms.isfinite()).sum())
        if broken:
            raise UserError(
                f"{what}: {broken:,} of its {len(self.squared_norms):,} inputs are not finite over the calibration "
                "samples: the checkpoint is damaged, or does not work in float32"
            )


def _mirror(matrix: Tensor) -> None:
    """Copy what is above the diagonal of a square matrix to below it, some columns at a time."""
    for start in range(0, len(matrix), _MIRRORED):
        own = slice(start, start + _MIRRORED)
        matrix[own.stop :, own] = matrix[own, own.stop :].t()
        corner = matrix[own, own]
        corner.copy_(corner.triu() + corner.triu(1).t())
