"""The model runner: one step of this rank's part of the model, from the previous pipeline stage to the next.

T = tokens of the step, R = tokens with an output, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...model.incremental_forward import IncrementalForward
from ...model.opt_model import OPTModel
from ...parallel.context import LEADER, ParallelContext
from ..step import KVCacheBlocks, OutputKind, ScheduledSequence, StepInput
from .kv_cache import KVCache


class ModelRunner:
    """Runs this rank's part of a model, and owns its cache; the same on every rank, and the leader gets the output.

    Args:
        model: is prepared for inference (`IncrementalForward`).
        suppressed: [ids] int64, which the argmax leaves out.
    """

    def __init__(self, model: OPTModel, parallel: ParallelContext, suppressed: Tensor) -> None:
        self._dtype = model.params_dtype
        self._model = IncrementalForward(model, parallel)
        self._parallel = parallel
        self._is_leader, self._is_first_stage = parallel.is_leader, parallel.is_first_stage
        self._is_last_stage, self._logits_rank = parallel.is_last_stage, parallel.logits_rank
        self._config = model.opt_config
        ranks = parallel.tensor_model_parallel_size
        rows = self._config.padded_vocab_size(ranks) // ranks
        self._first_row = parallel.tensor_model_parallel_rank * rows
        mine = suppressed - self._first_row
        self._suppressed = mine[(mine >= 0) & (mine < rows)].to(parallel.device)
        self._num_heads = self._config.num_attention_heads // parallel.tensor_model_parallel_size
        self._cache = self._make_cache(0)
        self._no_output = torch.empty(0, device=parallel.device)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of this rank's cache for one token."""
        return KVCache.bytes_per_token(self._model.num_layers, self._num_heads, self._config.head_dim, self._dtype)

    def allocate(self, num_tokens: int) -> None:
        """Allocate a cache of at least `num_tokens` tokens, unless the present one is as large."""
        if self._cache.num_tokens < num_tokens:
            self._cache = self._make_cache(0)  # release the old one before the new one is allocated
            self._cache = self._make_cache(num_tokens)

    def _make_cache(self, num_tokens: int) -> KVCache:
        return KVCache(
            self._model.num_layers,
            self._num_heads,
            self._config.head_dim,
            num_tokens,
            dtype=self._dtype,
            device=self._parallel.device,
        )

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of one sequence's blocks to another's."""
        self._cache.copy(source, target, begin, end)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Tensor:
        """One pass through this rank's stage.

        Returns:
            On the leader [R, 2] ids and logits, [R, V] logits, or [R, V + H] (see OutputKind); empty on other ranks.
        """
        parallel, sequences = self._parallel, step.sequences
        positions = self._cache.prepare_step(sequences)
        hidden = self._model.run_layers(self._stage_input(step, positions), self._cache)
        if not self._is_last_stage:
            dist.send(hidden.contiguous(), parallel.rank + parallel.pipeline_stride)
            return self._receive_output(step) if self._is_leader else self._no_output
        if any(sequence.num_logits != len(sequence.tokens) for sequence in sequences):
            hidden = hidden[_output_indices(sequences, parallel.device)]
        output = self._output(hidden, step.output_kind)
        if self._is_leader:
            return output
        if parallel.rank == self._logits_rank and len(output):
            dist.send(output.contiguous(), LEADER)
        return self._no_output

    def _stage_input(self, step: StepInput, positions: Tensor) -> Tensor:
        """[T, H]: embeddings on the first stage, elsewhere the previous stage's hidden states."""
        if self._is_first_stage:
            tokens = [token for sequence in step.sequences for token in sequence.tokens]
            return self._model.embed(torch.tensor(tokens, device=self._parallel.device), positions)
        shape = (len(positions), self._config.hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._parallel.device)
        dist.recv(hidden, self._parallel.rank - self._parallel.pipeline_stride)
        return hidden

    def _output(self, hidden: Tensor, kind: OutputKind) -> Tensor:
        if len(hidden) == 0:  # pieces of prompts whose logits are not needed: the head is not computed
            return hidden
        local = self._model.logits(hidden)
        if kind is OutputKind.ARGMAX:
            return self._argmax(local)
        logits = self._model.collectives.all_gather(local)[:, : self._config.vocab_size]
        return torch.cat((logits, hidden.float()), dim=-1) if kind is OutputKind.HIDDEN_STATES else logits

    def _argmax(self, local: Tensor) -> Tensor:
        """[R, 2]: the lowest of the best ids (exact in float64) and its logit, from every rank's part of the logits,
        into which -inf is written for suppressed ids."""
        value, index = local.index_fill_(-1, self._suppressed, -torch.inf).max(-1)
        mine = torch.stack((index.double() + self._first_row, value.double()), dim=-1)  # [R, 2]
        every = self._model.collectives.all_gather(mine).unflatten(-1, (-1, 2))  # [R, ranks, 2]
        winner = every[..., 1].argmax(-1)  # of equal ones the first, hence the lowest ids
        return every[torch.arange(len(every), device=every.device), winner]

    def _receive_output(self, step: StepInput) -> Tensor:
        count = sum(sequence.num_logits for sequence in step.sequences)
        is_argmax = step.output_kind is OutputKind.ARGMAX
        width = 2 if is_argmax else self._config.vocab_size
        if step.output_kind is OutputKind.HIDDEN_STATES:
            width += self._config.hidden_size
        dtype = torch.float64 if is_argmax else torch.float32
        output = torch.empty(count, width, dtype=dtype, device=self._parallel.device)
        if count:
            dist.recv(output, self._logits_rank)
        return output


def _output_indices(sequences: tuple[ScheduledSequence, ...], device: torch.device) -> Tensor:
    """Indices [R] of the step's tokens that have an output."""
    indices: list[int] = []
    end = 0
    for sequence in sequences:
        end += len(sequence.tokens)
        indices += range(end - sequence.num_logits, end)
    return torch.tensor(indices, dtype=torch.int64, device=device)
