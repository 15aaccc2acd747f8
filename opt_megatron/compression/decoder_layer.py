"""One decoder layer in float32, of which a tensor parallel rank holds rows of every matrix, of out_proj and fc2 too.

Megatron divides out_proj and fc2 by columns and sums the products, so that the last bits of a layer's output, and with
them the codes of weights that lie between two values, depend on the number of ranks. The methods here need whole rows,
and the statistics need the whole inputs of these matrices in any case. With the inputs gathered, and products of as
many rows as a head has, which every layout divides by, each output comes from the same call with the same numbers.

s = tokens of one sample, H = hidden_size, F = ffn_hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.parameter_mapping import EMBEDDING, POSITIONS, PREFIX, canonical_shapes
from ..checkpoint.storage.blocks import Block, whole
from ..checkpoint.write import row_blocks
from ..config import LAYERNORM_EPSILON, POSITION_OFFSET, OPTConfig
from ..parallel.collectives import tensor_parallel_collectives
from ..parallel.context import ParallelContext

# What is read -> the linears that read it, in the order in which they are compressed.
READERS = {
    "attention": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    "out_proj": ("self_attn.out_proj",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}
LINEARS = tuple(name for names in READERS.values() for name in names)
PROJECT_IN = f"{PREFIX}project_in.weight"


# Called with the name of what is read, and its values [s, I].
Observe = Callable[[str, Tensor], object]


class RowRanks:
    """The tensor parallel ranks, each of which holds as many rows of a matrix; methods are called on all of them."""

    def __init__(self, parallel: ParallelContext) -> None:
        self.rank, self.size = parallel.tensor_model_parallel_rank, parallel.tensor_model_parallel_size
        self._collectives = tensor_parallel_collectives(parallel)

    def own(self, total: int) -> slice:
        """This rank's rows of `total`, which the ranks divide."""
        size = total // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, side by side along the last dimension."""
        return self._collectives.all_gather(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; may overwrite the tensor."""
        return self._collectives.all_reduce(tensor)

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' values, of the tensor's shape."""
        return self._collectives.all_gather(tensor[..., None]).amax(-1)


def layer_shapes(config: OPTConfig, number: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer by the ends of their names (as fc1.weight), and their shapes."""
    prefix = layer_prefix(number)
    shapes = canonical_shapes(config).items()
    return {name.removeprefix(prefix): shape for name, shape in shapes if name.startswith(prefix)}


def layer_prefix(number: int) -> str:
    """How the canonical names of a layer's tensors begin."""
    return f"{PREFIX}layers.{number}."


def own_block(name: str, shape: tuple[int, ...], ranks: RowRanks) -> Block:
    """What a rank holds of a tensor of a layer: rows of a linear's weight and bias, and norms as a whole."""
    if name.rpartition(".")[0] in LINEARS:
        return (ranks.own(shape[0]), *whole(shape)[1:])
    return whole(shape)


def read_layer(checkpoint: Checkpoint, number: int, ranks: RowRanks, device: torch.device) -> dict[str, Tensor]:
    """This rank's part of a layer in float32, new tensors by the ends of their names.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    prefix = layer_prefix(number)
    return {
        name: checkpoint.read(prefix + name, own_block(name, shape, ranks)).to(device, torch.float32, copy=True)
        for name, shape in layer_shapes(checkpoint.config, number).items()
    }


class DecoderLayer:
    """A decoder layer's function, for one sample at a time.

    Attributes:
        tensors: this rank's part, by the ends of the names; they may be replaced.
    """

    def __init__(self, config: OPTConfig, tensors: dict[str, Tensor], ranks: RowRanks) -> None:
        self.tensors = tensors
        self._config, self._ranks = config, ranks

    def __call__(self, hidden: Tensor, observe: Observe = lambda name, values: None) -> Tensor:
        """Hidden states [s, H] after the layer, on every rank.

        Args:
            observe: receives what the linears read.
        """
        hidden = self._sublayer(hidden, "self_attn_layer_norm", lambda x: self._attention(x, observe))
        return self._sublayer(hidden, "final_layer_norm", lambda x: self._mlp(x, observe))

    def _sublayer(self, hidden: Tensor, norm: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        if self._config.do_layer_norm_before:
            return hidden + compute(self._norm(hidden, norm))
        return self._norm(hidden + compute(hidden), norm)

    def _attention(self, x: Tensor, observe: Observe) -> Tensor:
        observe("attention", x)
        query, key, value = (self._own_rows(f"self_attn.{name}_proj", x) for name in "qkv")
        query *= self._config.head_dim**-0.5
        q, k, v = (tensor.unflatten(1, (-1, self._config.head_dim)).transpose(0, 1) for tensor in (query, key, value))
        heads = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]  # [n, s, d]
        values = self._ranks.gather(heads.transpose(0, 1).flatten(1))
        observe("out_proj", values)
        return self._ranks.gather(self._own_rows("self_attn.out_proj", values))

    def _mlp(self, x: Tensor, observe: Observe) -> Tensor:
        observe("fc1", x)
        neurons = self._ranks.gather(self._own_rows("fc1", x).relu_())
        observe("fc2", neurons)
        return self._ranks.gather(self._own_rows("fc2", neurons))

    def _own_rows(self, name: str, x: Tensor) -> Tensor:
        size = self._config.head_dim  # of a product: how a library sums may depend on the number of rows
        weights, biases = (self.tensors[f"{name}.{kind}"].split(size) for kind in ("weight", "bias"))
        return torch.cat([linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)], -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, (x.size(-1),), weight, bias, LAYERNORM_EPSILON)


def embed(checkpoint: Checkpoint, samples: list[Tensor], device: torch.device) -> list[Tensor]:
    """What the first layer reads, [s, H] in float32, of each sample of ids [s].

    The table of the embedding is read block by block, and only the rows that occur are kept.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    ids = torch.cat([sample.long() for sample in samples]).unique()
    table = torch.empty(len(ids), checkpoint.config.word_embed_proj_dim)
    for first, rows in row_blocks(checkpoint, EMBEDDING):
        is_here = (ids >= first) & (ids < first + len(rows))
        table[is_here] = rows[ids[is_here] - first].float()
    if checkpoint.config.has_embedding_projection:
        table = linear(table, checkpoint.read(PROJECT_IN).float())
    positions = checkpoint.read(POSITIONS)[POSITION_OFFSET:].float()
    return [(table[torch.searchsorted(ids, sample.long())] + positions[: len(sample)]).to(device) for sample in samples]
