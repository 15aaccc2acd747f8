"""Carrying out plans on one rank: the model's pass, from the previous pipeline stage to the next.

R = tokens that the leader asks about, V = vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...model.incremental_forward import InferenceModel
from ...parallel.context import LEADER, ParallelContext
from ..step import Extent, Kind, Output, Row, Step
from .kv_cache import KVCache


class Runner(Protocol):
    """What the engine needs of a model; tests put other things in its place."""

    def allocate(self, tokens: int) -> None:
        """Make a cache of so many tokens, if there is not one as large."""

    def forward(self, step: Step) -> Tensor | None:
        """One pass. On the leader: [R, 2] ids and logits, [R, V] logits, or [R, V + H] (see Output)."""

    def copy(self, numbers: list[int]) -> None:
        """Kind.COPY's numbers, without the model's."""


class ModelRunner:
    """Holds this rank's model and cache; the same code on every rank, and the leader gets the output."""

    def __init__(self, model: nn.Module, parallel: ParallelContext, num_tokens: int) -> None:
        """Prepare the model for inference (`InferenceModel`).

        Args:
            num_tokens: ids from this one on are vocabulary padding and cut off the logits.
        """
        self._dtype = model.params_dtype
        self._model = InferenceModel(model, parallel)
        self._parallel = parallel
        self._config = model.opt_config
        self._num_tokens = num_tokens
        self._heads = self._config.num_attention_heads // parallel.tensor_model_parallel_size
        self._cache: KVCache | None = None

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that a token takes in this rank's cache."""
        return KVCache.bytes_per_token(self._model.num_layers, self._heads, self._config.head_dim, self._dtype)

    def allocate(self, tokens: int) -> None:
        """Make a cache of so many tokens, if there is not one as large."""
        if self._cache is not None and self._cache.tokens >= tokens:
            return
        self._cache = None  # release the old one before the new one is made
        self._cache = KVCache(
            self._model.num_layers,
            self._heads,
            self._config.head_dim,
            tokens,
            dtype=self._dtype,
            device=self._parallel.device,
        )

    def copy(self, numbers: list[int]) -> None:
        """Copy a part of one extent to another."""
        self._cache.copy(Extent(*numbers[:2]), Extent(*numbers[2:4]), *numbers[4:])

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor | None:
        """One pass through this rank's stage; the leader gets the output."""
        parallel = self._parallel
        positions = self._cache.begin(step.rows)
        hidden = self._enter(step, positions)
        hidden = self._model.run_layers(hidden, self._cache)
        asked = _asked(step.rows, parallel.device)
        if not parallel.is_last_stage:
            dist.send(hidden.contiguous(), parallel.rank + parallel.pipeline_stride)
            return self._receive(step, _count(step.rows)) if parallel.is_leader else None
        output = self._output(hidden if asked is None else hidden[asked], step.output)
        if parallel.is_leader:
            return output
        if parallel.rank == parallel.logits_rank and len(output):
            dist.send(output.contiguous(), LEADER)
        return None

    def _enter(self, step: Step, positions: Tensor) -> Tensor:
        if self._parallel.is_first_stage:
            tokens = torch.tensor([token for row in step.rows for token in row.tokens], device=self._parallel.device)
            return self._model.embed(tokens, positions)
        shape = (len(positions), self._config.hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._parallel.device)
        dist.recv(hidden, self._parallel.rank - self._parallel.pipeline_stride)
        return hidden

    def _output(self, hidden: Tensor, kind: Output) -> Tensor:
        if len(hidden) == 0:  # pieces of prompts that nobody asks about yet: no head
            return hidden
        local = self._model.logits(hidden)
        rank = self._parallel.tensor_model_parallel_rank
        room = self._num_tokens - rank * local.size(1)  # rows of this rank that are no padding
        if kind is Output.BEST:
            return self._best(local, rank * local.size(1), room)
        logits = self._model.collectives.all_gather(local)[:, : self._num_tokens]
        return torch.cat((logits, hidden.float()), dim=-1) if kind is Output.HIDDEN else logits

    def _best(self, local: Tensor, first: int, room: int) -> Tensor:
        """[R, 2]: the lowest of the best ids (exact in float64) and its logit."""
        if room > 0:
            value, index = local[:, :room].max(-1)
        else:
            value = torch.full_like(local[:, 0], -torch.inf)
            index = torch.zeros_like(value, dtype=torch.int64)
        mine = torch.stack((index.double() + first, value.double()), dim=-1)  # [R, 2]
        every = self._model.collectives.all_gather(mine).unflatten(-1, (-1, 2))  # [R, ranks, 2]
        winner = every[..., 1].argmax(-1)  # the first, hence the lowest ids, of equal ones
        return every[torch.arange(len(every), device=every.device), winner]

    def _receive(self, step: Step, rows: int) -> Tensor:
        width = {Output.BEST: 2, Output.LOGITS: self._num_tokens}.get(
            step.output, self._num_tokens + self._config.hidden_size
        )
        dtype = torch.float64 if step.output is Output.BEST else torch.float32
        output = torch.empty(rows, width, dtype=dtype, device=self._parallel.device)
        if rows:
            dist.recv(output, self._parallel.logits_rank)
        return output


def _count(rows: tuple[Row, ...]) -> int:
    return sum(row.asked for row in rows)


def _asked(rows: tuple[Row, ...], device: torch.device) -> Tensor | None:
    """Indices [R] of the tokens that are asked about; None for all."""
    if all(row.asked == len(row.tokens) for row in rows):
        return None
    indices, first = [], 0
    for row in rows:
        first += len(row.tokens)
        indices += range(first - row.asked, first)
    return torch.tensor(indices, dtype=torch.int64, device=device)


def carry_out(runners: list[Runner], kind: Kind, numbers: list[int]) -> Tensor | None:
    """Do what a plan says with this rank's runners (the model's, and a draft model's if there is one)."""
    if kind is Kind.ALLOCATE:
        for runner, tokens in zip(runners, numbers, strict=True):
            runner.allocate(tokens)
    elif kind is Kind.COPY:
        runners[numbers[0]].copy(numbers[1:])
    elif kind is Kind.FORWARD:
        return runners[numbers[0]].forward(Step.from_numbers(numbers[1:]))
    return None
