"""350m's embedding is half as wide as the model: two bias-free matrices stand between them.

H = hidden_size, W = word_embed_proj_dim, V = vocabulary rows of this tensor parallel rank. Both matrices
are replicated on every tensor parallel rank.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn


class ProjectedEmbedding(VocabParallelEmbedding):
    """Token embedding [V, W] followed by `project_in` [H, W], before positions are added."""

    def __init__(self, num_embeddings: int, embedding_dim: int, hidden_size: int, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.project_in = _projection(embedding_dim, hidden_size, self.weight)

    def forward(self, input_: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, H]"""
        return self.project_in(super().forward(input_))


class ProjectedOutputLayer(ColumnParallelLinear):
    """`project_out` [W, H], then the output head [V, W] that is tied to the embedding."""

    def __init__(self, hidden_size: int, word_embed_proj_dim: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(word_embed_proj_dim, output_size, **kwargs)
        self.project_out = nn.Linear(hidden_size, word_embed_proj_dim, bias=False)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, H] -> logits [s, b, V] (or of the whole vocabulary, when gathered), and no bias"""
        return super().forward(self.project_out(input_), *args, **kwargs)


def _projection(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
