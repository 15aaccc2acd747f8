"""Embedding and output head: tied, divided over the vocabulary, and in 350m narrower than the model.

H = hidden_size, W = the embedding's width (H, but for 350m), V = vocabulary rows of this tensor parallel
rank. 350m has two bias-free matrices between the widths, replicated on every tensor parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import VocabParallelEmbedding, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import embedding

from .linear import DeferredWeight, OPTOutputLayer, mark_sequence_parallel
from .linear_methods.base import EmbeddingRows, LinearMethod
from .linear_methods.torch_linear import TorchLinear


class OPTEmbedding(DeferredWeight, VocabParallelEmbedding):
    """Token embedding [V, W], and 350m's `project_in` [H, W] after it, before positions are added.

    Args:
        method: says how the table is stored while loading, if it defers weights.

    Attributes:
        packed: the table as the linear method stores it; None while it is the parameter `weight`.
    """

    packed: EmbeddingRows | None = None
    tp_group: dist.ProcessGroup
    vocab_start_index: int
    vocab_end_index: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        hidden_size: int,
        *,
        method: type[LinearMethod] = TorchLinear,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.method = method
        self._dtype = self._float_table().dtype  # of the rows
        is_projected = embedding_dim != hidden_size
        self.project_in = _projection(embedding_dim, hidden_size, self._float_table()) if is_projected else None

    def defer_weight(self) -> None:
        """Free the table's memory, if the method stores it otherwise."""
        if self.method.embedding_rows is not None:
            super().defer_weight()

    def store_weight(self, weight: Tensor) -> None:
        """Store the table [V, W] by the method."""
        make_rows = self.method.embedding_rows
        assert make_rows is not None
        self.packed = make_rows(weight)

    def rows(self, ids: Tensor) -> Tensor:
        """This rank's rows [..., W] for ids [...] counted from its first row."""
        return embedding(ids, self._float_table()) if self.packed is None else self.packed[ids].to(self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype  # model.half() and the like
        return super()._apply(fn, recurse)

    def _float_table(self) -> Tensor:
        assert self.weight is not None
        return self.weight

    def local_rows(self, ids: Tensor) -> Tensor:
        """This rank's part [..., W] of the sum over the ranks: its rows, and zeros for the others' ids."""
        if self.tp_group.size() == 1:
            return self.rows(ids)
        foreign = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        return self.rows((ids - self.vocab_start_index).masked_fill(foreign, 0)).masked_fill(foreign[..., None], 0)

    def project(self, rows: Tensor) -> Tensor:
        """[..., W] -> [..., H]"""
        return rows if self.project_in is None else self.project_in(rows)

    def forward(self, input_: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, H]"""
        if self.packed is None:
            return self.project(super().forward(input_))
        return self.project(reduce_from_tensor_model_parallel_region(self.local_rows(input_), group=self.tp_group))

    def head_weight(self) -> Tensor:
        """[V, W], for a head on the same rank."""
        return self._float_table() if self.packed is None else self.packed.table()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Core's sharded state, which has only the table, and `project_in`, whole on every rank."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.project_in is not None:
            groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
            own = {"project_in.weight": self.project_in.weight}
            sharded |= make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets, **groups)
        return sharded


class ProjectedOutputLayer(OPTOutputLayer):
    """350m: `project_out` [W, H], then the head [V, W]."""

    def __init__(self, hidden_size: int, word_embed_proj_dim: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(word_embed_proj_dim, output_size, **kwargs)
        self.project_out = nn.Linear(hidden_size, word_embed_proj_dim, bias=False)
        # Applied before the gather, to this rank's part of the sequence.
        mark_sequence_parallel(self.project_out.weight, self.sequence_parallel)

    def infer(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """[T, H] -> [T, V]"""
        return super().infer(self.project_out(x), residual, relu=relu)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, H] -> logits [s, b, V] (or of the whole vocabulary, when gathered), and no bias"""
        if self.packed is None:  # core's product
            return super().forward(self.project_out(input_), *args, **kwargs)
        return super().forward(input_, *args, **kwargs)


def _projection(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
