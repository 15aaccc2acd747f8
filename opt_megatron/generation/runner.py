"""Carrying out plans on one rank: the model's forward pass, from the previous stage to the next."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel import LEADER, ParallelContext
from .kv_cache import KVCache
from .plan import Kind, Step


class ModelRunner:
    """Holds this rank's model and cache, and does what a plan says.

    The same code runs on every rank; the leader gets the logits.
    """

    def __init__(self, model: nn.Module, parallel: ParallelContext) -> None:
        self._model = model.eval()
        self._parallel = parallel
        self._config = model.opt_config
        self._cache: KVCache | None = None

    def do(self, kind: Kind, numbers: list[int]) -> Tensor | None:
        """Carry out one plan.

        Returns:
            On the leader after FORWARD: the logits [b, vocabulary] of each row's last token; else None.
        """
        if kind is Kind.ALLOCATE:
            self._allocate(*numbers)
        elif kind is Kind.MOVE:
            self._cache.move(*numbers)
        elif kind is Kind.FORWARD:
            return self._forward(Step.from_numbers(numbers))
        return None

    @property
    def _dtype(self) -> torch.dtype:
        # Asked each time: FlagAI's scripts call model.half() after the model was built.
        return next(self._model.parameters()).dtype

    def _allocate(self, slots: int, length: int) -> None:
        layers = self._model.decoder.layers
        self._cache = None  # release the old one before the new one is made
        self._cache = KVCache(
            len(layers),
            layers[0].layer_number,
            slots,
            self._config.num_attention_heads // self._parallel.tensor_model_parallel_size,
            length,
            self._config.head_dim,
            dtype=self._dtype,
            device=self._parallel.device,
        )

    @torch.inference_mode()
    def _forward(self, step: Step) -> Tensor | None:
        cache, parallel = self._cache, self._parallel
        cache.begin(step)
        tokens = torch.tensor(step.tokens, device=parallel.device)  # [b, s]
        if not parallel.is_first_stage:
            self._model.set_input_tensor(self._receive_hidden(tokens.shape))
        output = self._model(tokens, cache.position_ids, cache.attention_mask, inference_context=cache)
        if not parallel.is_last_stage:
            dist.send(output.contiguous(), parallel.rank + parallel.pipeline_stride)
            return self._receive_logits(tokens.size(0)) if parallel.is_leader else None
        logits = output[:, -1].float()  # [b, vocabulary]
        if parallel.is_leader:
            return logits
        if parallel.rank == parallel.logits_rank:
            dist.send(logits.contiguous(), LEADER)
        return None

    def _receive_hidden(self, shape: torch.Size) -> Tensor:
        rows, columns = shape
        hidden = torch.empty(columns, rows, self._config.hidden_size, dtype=self._dtype, device=self._parallel.device)
        dist.recv(hidden, self._parallel.rank - self._parallel.pipeline_stride)
        return hidden

    def _receive_logits(self, rows: int) -> Tensor:
        logits = torch.empty(rows, self._config.vocab_size, dtype=torch.float32, device=self._parallel.device)
        dist.recv(logits, self._parallel.logits_rank)
        return logits
