"""The parameter mapping: for each Megatron module its canonical name and how it is split.

Names, fusing and splitting are kept apart. Fusing happens in one place only: Megatron stores q, k and v in one
matrix, interleaved per attention head (T = tensor parallel ranks, d = head_dim):

    canonical            q = [q0 q1 q2 q3]   k = [k0 k1 k2 k3]   v = [v0 v1 v2 v3]      4 heads of d rows
    linear_qkv           [q0 k0 v0  q1 k1 v1  q2 k2 v2  q3 k3 v3]
    T = 2, rank 0        [q0 k0 v0  q1 k1 v1]

so a rank holds contiguous rows of q, k and v, and each of them is split like any other tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ..config import OPTConfig
from .storage.blocks import Block, whole

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "model.decoder."
EMBEDDING = PREFIX + "embed_tokens.weight"
POSITIONS = PREFIX + "embed_positions.weight"


class Split(Enum):
    """How one parameter is divided among tensor parallel ranks: the dimension that is split."""

    REPLICATED = None  # norms, positions, row-parallel biases, 350m's projections
    COLUMN = 0  # embedding, attention input, fc1: weights and biases
    ROW = 1  # attention output and fc2: weights only


@dataclass(frozen=True)
class ModuleMapping:
    """A Megatron module, the canonical modules it consists of, and how weight and bias are split (None: no bias)."""

    megatron: str
    canonical: tuple[str, ...]
    weight: Split
    bias: Split | None


@dataclass(frozen=True)
class ParameterMapping:
    """One parameter of a Megatron stage and the canonical tensors that it consists of (q, k and v, or one)."""

    megatron: str
    canonical: tuple[str, ...]
    split: Split


# fmt: off
_FIRST_STAGE = (
    ModuleMapping("embedding.word_embeddings",     ("embed_tokens",),    Split.COLUMN,     None),
    ModuleMapping("embedding.position_embeddings", ("embed_positions",), Split.REPLICATED, None),
)
_LAYER = (
    ModuleMapping("self_attention.linear_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                                                                  Split.COLUMN, Split.COLUMN),
    ModuleMapping("self_attention.linear_proj", ("self_attn.out_proj",), Split.ROW,    Split.REPLICATED),
    ModuleMapping("mlp.linear_fc1",             ("fc1",),                Split.COLUMN, Split.COLUMN),
    ModuleMapping("mlp.linear_fc2",             ("fc2",),                Split.ROW,    Split.REPLICATED),
)
_PRE_NORM = (
    ModuleMapping("input_layernorm",   ("self_attn_layer_norm",), Split.REPLICATED, Split.REPLICATED),
    ModuleMapping("pre_mlp_layernorm", ("final_layer_norm",),     Split.REPLICATED, Split.REPLICATED),
)
_POST_NORM = (  # 350m normalises after the residual add
    ModuleMapping("self_attn_bda.norm", ("self_attn_layer_norm",), Split.REPLICATED, Split.REPLICATED),
    ModuleMapping("mlp_bda.norm",       ("final_layer_norm",),     Split.REPLICATED, Split.REPLICATED),
)
_FINAL_NORM  = ModuleMapping("decoder.final_layernorm", ("final_layer_norm",), Split.REPLICATED, Split.REPLICATED)
_PROJECT_IN  = ModuleMapping("embedding.word_embeddings.project_in", ("project_in",), Split.REPLICATED, None)
_PROJECT_OUT = ModuleMapping("output_layer.project_out", ("project_out",), Split.REPLICATED, None)
_TIED_OUTPUT = ModuleMapping("output_layer", ("embed_tokens",), Split.COLUMN, None)
# fmt: on

_SPLITS = {
    (name, kind): split
    for module in (*_FIRST_STAGE, *_LAYER)
    for name in module.canonical
    for kind, split in (("weight", module.weight), ("bias", module.bias))
    if split is not None
}


def stage_parameters(config: OPTConfig, layers: range, *, first: bool, last: bool) -> list[ParameterMapping]:
    """The parameters of one pipeline stage, under Megatron's names (layer numbers start at 0 in a stage).

    Args:
        layers: the model's layers that this stage holds.
        first: it is the first stage and holds the embedding.
        last: it is the last stage and holds the output head, a copy of the embedding unless it is the first too.
    """
    modules: list[tuple[ModuleMapping, str, str]] = []  # module, Megatron prefix, canonical prefix
    if first:
        modules += [(module, "", PREFIX) for module in _FIRST_STAGE]
        modules += [(_PROJECT_IN, "", PREFIX)] if config.has_embedding_projection else []
    for local, layer in enumerate(layers):
        for module in _LAYER + (_PRE_NORM if config.do_layer_norm_before else _POST_NORM):
            modules.append((module, f"decoder.layers.{local}.", f"{PREFIX}layers.{layer}."))
    if last:
        modules += [(_FINAL_NORM, "", PREFIX)] if config.has_final_layer_norm else []
        modules += [(_PROJECT_OUT, "", PREFIX)] if config.has_embedding_projection else []
        modules += [] if first else [(_TIED_OUTPUT, "", PREFIX)]
    return [parameter for module in modules for parameter in _parameters(*module)]


def canonical_shapes(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, for every tensor of a model."""
    h, f, w = config.hidden_size, config.ffn_hidden_size, config.word_embed_proj_dim
    widths = {  # last part of a module's name: (rows, columns)
        "embed_tokens": (config.vocab_size, w),
        "embed_positions": (config.num_position_rows, h),
        "project_in": (h, w),
        "project_out": (w, h),
        "fc1": (f, h),
        "fc2": (h, f),
    }

    def shape(name: str) -> tuple[int, ...]:
        module, kind = name.rsplit(".", 2)[-2:]
        rows, columns = widths.get(module, (h, h))
        return (rows,) if kind == "bias" or module.endswith("layer_norm") else (rows, columns)

    parameters = stage_parameters(config, range(config.num_layers), first=True, last=True)
    return {name: shape(name) for parameter in parameters for name in parameter.canonical}


def split_of(name: str) -> Split:
    """How a canonical tensor is split into metaseq's and FlagAI's parts, the same as into Megatron's ranks."""
    module, _, kind = name.removeprefix(PREFIX).rpartition(".")
    return _SPLITS.get((module.split(".", 2)[2] if module.startswith("layers.") else module, kind), Split.REPLICATED)


def layers_of_stage(num_layers: int, stages: int, stage: int) -> range:
    """The layers of pipeline stage `stage` when all stages hold equally many."""
    per_stage = num_layers // stages
    return range(stage * per_stage, (stage + 1) * per_stage)


def even_stage_parameters(config: OPTConfig, stages: int, stage: int) -> list[ParameterMapping]:
    """`stage_parameters` of pipeline stage `stage` when all stages hold equally many layers."""
    layers = layers_of_stage(config.num_layers, stages, stage)
    return stage_parameters(config, layers, first=stage == 0, last=stage == stages - 1)


def rank_block(shape: tuple[int, ...], split: Split, rank: int, ranks: int) -> Block:
    """The block of a canonical tensor that belongs to tensor parallel rank `rank` of `ranks`.

    Where the vocabulary does not divide by the ranks, the last ones have fewer rows or none, and padding after them.
    """
    block = list(whole(shape))
    if split.value is not None:
        total = shape[split.value]
        size = -(-total // ranks)
        block[split.value] = slice(min(rank * size, total), min((rank + 1) * size, total))
    return tuple(block)


def component_view(parameter: Tensor, index: int, count: int, head_dim: int) -> Tensor:
    """The view of a Megatron tensor that holds its canonical tensor number `index` of `count`.

    For `linear_qkv` that is q, k or v of every head: [heads, 3, d, ...][:, index]. Otherwise it is the whole tensor.
    """
    if count == 1:
        return parameter
    return parameter.unflatten(0, (-1, count, head_dim))[:, index]


def block_view(parameter: Tensor, index: int, count: int, head_dim: int, block: Block) -> Tensor:
    """The view of a rank's Megatron tensor that holds this block (`rank_block`) of canonical tensor number `index`.

    What follows it in an embedding is padding of the vocabulary.
    """
    view = component_view(parameter, index, count, head_dim)
    return view[: block[0].stop - block[0].start] if count == 1 else view


def row_pieces(view: Tensor, block: Block, max_elements: int) -> Iterator[tuple[Tensor, Block]]:
    """Parts of a view (`block_view`) of a few rows each, with the part of `block` that each of them holds.

    Args:
        max_elements: of a part, unless one row (of q, k or v a head's rows) has more.
    """
    rows = (block[0].stop - block[0].start) // max(1, len(view))  # of each index of the view: 1, or a head's
    step = max(1, max_elements // max(1, view[:1].numel()))
    for first in range(0, len(view), step):
        part = view[first : first + step]
        start = block[0].start + first * rows
        yield part, (slice(start, start + len(part) * rows), *block[1:])


def _parameters(module: ModuleMapping, megatron_prefix: str, canonical_prefix: str) -> Iterator[ParameterMapping]:
    for kind, split in (("weight", module.weight), ("bias", module.bias)):
        if split is not None:
            yield ParameterMapping(
                f"{megatron_prefix}{module.megatron}.{kind}",
                tuple(f"{canonical_prefix}{name}.{kind}" for name in module.canonical),
                split,
            )
