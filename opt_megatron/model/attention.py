"""OPT's attention on Megatron-core: torch's attention kernel for the forward pass of whole sequences.

Shapes: s = queries, t = keys, b = rows of the batch, n = attention heads of this tensor
parallel rank, d = head_dim. Megatron's order is [s, b, n, d], the kernel's is [b, n, s, d].
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class OPTCoreAttention(MegatronModule):
    """softmax(q d**-0.5 k^T) v by `scaled_dot_product_attention`, for the heads of this rank.

    The query is scaled before the product, as transformers' OPTAttention does, so that the two agree to
    the bit. It takes Megatron's `core_attention` arguments and ignores those that OPT does not need.
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float, **unused: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        **unused: Any,
    ) -> Tensor:
        """Compute the attention of all sequences.

        Args:
            query: [s, b, n, d]; key and value: [t, b, n, d].
            attention_mask: bool, True where a query may attend, broadcastable to [b, n, s, t]. None means
                causal when s > 1 (then s = t), and everything when s = 1.

        Returns:
            [s, b, n * d]
        """
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, n, s|t, d]
        dropout = self.config.attention_dropout if self.training else 0.0
        with self._rank_random_state(dropout):
            output = scaled_dot_product_attention(
                q * self.softmax_scale,
                k,
                v,
                attn_mask=attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None and q.size(2) > 1,
                scale=1.0,
            )
        return output.permute(2, 0, 1, 3).flatten(2)  # [s, b, n * d]

    def _rank_random_state(self, dropout: float) -> contextlib.AbstractContextManager[None]:
        """Dropout differs between tensor parallel ranks; with sequence parallelism core's block does this."""
        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()


def padding_mask_to_inputs(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and attention mask of a padded batch, as transformers' OPT computes them.

    Args:
        attention_mask: [b, s], 1 for tokens and 0 for padding on either side.

    Returns:
        Positions [b, s] (-1 for padding, which the offset turns into the table's padding row) and a
        bool mask [b, 1, s, s]. A padding query attends to itself, so that no row of the softmax is empty
        (an empty one gives NaN in half precision).
    """
    real = attention_mask.to(torch.bool)
    positions = real.long().cumsum(dim=1) * real - 1
    size = real.size(1)
    causal = torch.ones(size, size, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=real.device)
    return positions, ((causal & real[:, None, :]) | itself)[:, None]
