"""A pass over whole sequences on any layout: one pipeline stage, and the logits that a rank's head computes.

s = tokens of a sequence, b = sequences, H = hidden_size, V = vocabulary rows of this tensor parallel rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import POSITION_OFFSET
from ..parallel.context import ParallelContext
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


def local_logits(model: OPTModel, hidden: Tensor) -> Tensor:
    """Logits [R, V] in float32 of hidden states [R, H]; on the last stage. V are this rank's vocabulary rows."""
    weight = model.shared_embedding_or_output_weight()
    logits, _ = model.output_layer(hidden[:, None], weight=weight, runtime_gather_output=False)
    return logits[:, 0].float()
