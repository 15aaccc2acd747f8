"""A pass over whole sequences on any layout: one pipeline stage, and the logits that a rank's head computes.

s = tokens of a sequence, b = sequences, H = hidden_size, V = vocabulary rows of this tensor parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..config import POSITION_OFFSET
from ..parallel.context import ParallelContext
from .incremental_forward import IncrementalForward
from .opt_model import OPTModel


def stage_forward(model: OPTModel, parallel: ParallelContext, tokens: Tensor) -> Tensor:
    """Run this rank's pipeline stage; called on every rank.

    A stage sends its output to the next one and can then start with another batch while later stages compute.

    Args:
        tokens: [b, s], on the context's device, padded on the right if at all. Attention is causal, so padding on
            the right changes nothing to its left and needs no mask.

    Returns:
        Hidden states [s, b, H] after the stage's layers; on the last stage after the final norm.
    """
    hidden = None
    if parallel.is_first_stage:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        hidden = model.embedding(input_ids=tokens, position_ids=positions + POSITION_OFFSET)
    else:
        shape = (tokens.size(1), tokens.size(0), model.opt_config.hidden_size)
        received = torch.empty(shape, dtype=model.params_dtype, device=parallel.device)
        dist.recv(received, parallel.rank - parallel.pipeline_stride)
        model.set_input_tensor(received)
    hidden = model.decoder(hidden_states=hidden, attention_mask=None)
    if not parallel.is_last_stage:
        dist.send(hidden.contiguous(), parallel.rank + parallel.pipeline_stride)
    return hidden


class CausalAttention:
    """Attention of a batch of whole sequences, for `IncrementalForward.run_layers`: nothing is cached.

    Args:
        shape: b and s; the rows of a step are those of [b, s].
    """

    def __init__(self, shape: torch.Size) -> None:
        self._shape = shape

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """[b * s, n, 3, d] -> [b * s, n * d]"""
        query, key, value = query_key_value.unflatten(0, self._shape).permute(3, 0, 2, 1, 4)  # [b, n, s, d]
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2).flatten(0, 1).flatten(1)


def packed_stage_forward(forward: IncrementalForward, parallel: ParallelContext, tokens: Tensor) -> Tensor:
    """`stage_forward` by the functions of generation: biases, ReLU and residuals are parts of the products.

    Args:
        forward: of a model whose weights are packed.
        tokens: [b, s] as for `stage_forward`.

    Returns:
        As `stage_forward`, [s, b, H].
    """
    if parallel.is_first_stage:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        hidden = forward.embed(tokens.flatten(), positions.flatten())
    else:
        shape = (tokens.numel(), forward.hidden_size)
        hidden = torch.empty(shape, dtype=forward.dtype, device=parallel.device)
        dist.recv(hidden, parallel.rank - parallel.pipeline_stride)
    hidden = forward.run_layers(hidden, CausalAttention(tokens.shape))
    if not parallel.is_last_stage:
        dist.send(hidden.contiguous(), parallel.rank + parallel.pipeline_stride)
    return hidden.unflatten(0, tokens.shape).transpose(0, 1)


def local_logits(model: OPTModel, hidden: Tensor) -> Tensor:
    """Logits [R, V] in float32 of hidden states [R, H]; on the last stage. V are this rank's vocabulary rows."""
    weight = model.shared_embedding_or_output_weight()
    logits, _ = model.output_layer(hidden[:, None], weight=weight, runtime_gather_output=False)
    return logits[:, 0].float()
