"""The memory that each rank of a layout needs, computed from the config: no checkpoint is opened.

Weights are counted from the parameter mapping that loading uses. The rest is arithmetic, per rank:

    KV cache       2 * layers * batch * context * hidden / T * bytes
    activations    the peak of a forward pass over the whole context (prefill): residual, attention
                   input and output, q k v, and the two halves of the MLP
    logits         batch * vocabulary * 4, gathered in float32 on the last stage

T = tensor parallel size. Attention scores are not counted: the kernels that are used never store them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import BYTES_OF_DTYPE, OPTConfig
from ..errors import UserError
from ..parallel.layout import tensor_parallel_sizes
from .parameter_mapping import Split, canonical_shapes, layers_of_stage, rank_block, stage_parameters
from .storage.blocks import block_shape


@dataclass(frozen=True)
class Workload:
    """What runs: sequences in the batch, the most tokens of a sequence, and the dtype of weights and activations."""

    batch: int
    context: int
    dtype: str

    @property
    def itemsize(self) -> int:
        """Size of one value in bytes."""
        return BYTES_OF_DTYPE[self.dtype]


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds, in bytes; `vocabulary_rows` is None on a stage without embedding and output head."""

    tensor_rank: int
    stage: int
    layers: range
    heads: range
    vocabulary_rows: range | None
    weights: int
    kv_cache: int
    activations: int
    read_from_disk: int

    @property
    def total(self) -> int:
        """Memory of weights, KV cache and activations."""
        return self.weights + self.kv_cache + self.activations


def estimate_ranks(config: OPTConfig, tp: int, pp: int, workload: Workload, stored: str) -> list[RankMemory]:
    """The memory of every rank, in the order of ranks.

    Args:
        stored: name of the dtype of the checkpoint's tensors, which decides how much is read from the disk.

    Raises:
        UserError: the context is longer than the model's positions, or a number is below 1.
    """
    _check(config, workload)
    return [_estimate_rank(config, tp, pp, rank, stage, workload, stored) for stage in range(pp) for rank in range(tp)]


def _estimate_rank(
    config: OPTConfig, tp: int, pp: int, rank: int, stage: int, workload: Workload, stored: str
) -> RankMemory:
    layers = layers_of_stage(config.num_layers, pp, stage)
    first, last = stage == 0, stage == pp - 1
    shapes = canonical_shapes(config)
    held = read = 0
    for parameter in stage_parameters(config, layers, first=first, last=last):
        for name in parameter.canonical:
            # All ranks hold as much as the first: they pad the vocabulary.
            held += math.prod(block_shape(rank_block(shapes[name], parameter.split, 0, tp)))
            read += math.prod(block_shape(rank_block(shapes[name], parameter.split, rank, tp)))
    rows = rank_block((config.vocab_size,), Split.COLUMN, rank, tp)[0]
    heads = config.num_attention_heads // tp
    return RankMemory(
        tensor_rank=rank,
        stage=stage,
        layers=layers,
        heads=range(rank * heads, (rank + 1) * heads),
        vocabulary_rows=range(rows.start, rows.stop) if first or last else None,
        weights=held * workload.itemsize,
        kv_cache=2 * len(layers) * workload.batch * workload.context * heads * config.head_dim * workload.itemsize,
        activations=_activations(config, tp, workload, last=last),
        read_from_disk=read * BYTES_OF_DTYPE[stored],
    )


def _activations(config: OPTConfig, tp: int, workload: Workload, *, last: bool) -> int:
    """The larger of a layer (the residual and its attention half or its MLP half) and the logits."""
    tokens, size = workload.batch * workload.context, workload.itemsize
    h, f = config.hidden_size, config.ffn_hidden_size
    attention = h + 3 * h // tp + h // tp + h // tp + h  # normalised input, q k v, scaled q, heads' output, projection
    mlp = h + 2 * f // tp + h  # normalised input, before and after ReLU, projection
    layer = tokens * size * (h + max(attention, mlp))
    logits = workload.batch * config.vocab_size * (size + 4) if last else 0
    return max(layer, logits)


def smallest_layouts(
    config: OPTConfig, workload: Workload, stored: str, device_memory: int, largest: int = 128
) -> list[tuple[int, int, int]]:
    """The layouts that fit with the fewest ranks, as (T, P, bytes of the fullest rank), fewest stages first.

    Args:
        stored: as for `estimate_ranks`.
        device_memory: bytes of one device that may be used.
        largest: the most ranks to try.
    """
    _check(config, workload)
    stage_counts = [p for p in range(1, config.num_layers + 1) if config.num_layers % p == 0]
    fitting = []
    for t in tensor_parallel_sizes(config):
        for p in stage_counts:
            if t * p <= largest:
                fullest = max(rank.total for rank in _distinct_ranks(config, t, p, workload, stored))
                if fullest <= device_memory:
                    fitting.append((t * p, p, t, fullest))
    fewest = min((ranks for ranks, *_ in fitting), default=0)
    return [(t, p, fullest) for ranks, p, t, fullest in sorted(fitting) if ranks == fewest]


def _distinct_ranks(config: OPTConfig, tp: int, pp: int, workload: Workload, stored: str) -> list[RankMemory]:
    # The tensor ranks of a stage need the same memory, and so do the stages between the first and the last.
    return [_estimate_rank(config, tp, pp, 0, stage, workload, stored) for stage in sorted({0, pp // 2, pp - 1})]


def _check(config: OPTConfig, workload: Workload) -> None:
    if workload.batch < 1 or workload.context < 1:
        raise UserError(f"batch {workload.batch} and context {workload.context} must be at least 1")
    if workload.context > config.max_position_embeddings:
        raise UserError(
            f"a context of {workload.context} passes the model's {config.max_position_embeddings} positions"
        )
