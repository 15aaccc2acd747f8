"""What each format's files hold, described before a byte is written.

A writer gives a list of `OutputFile`s: for every stored tensor its name, shape and dtype, and which blocks
of canonical tensors its bytes are, in order. `scatter.py` creates the files and fills them. Writers read
nothing, so what they describe can be checked, and planned with, in no time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...config import OPTConfig
from ...errors import UserError
from ..parameter_mapping import (
    EMBEDDING,
    METASEQ_NAMES,
    PREFIX,
    Parameter,
    Split,
    canonical_shapes,
    rank_block,
    split_of,
    stage_parameters,
)
from ..storage.blocks import Block, whole
from .megatron import RANK_FILE, megatron_args, rank_directory

DtypeOf = Callable[[str], torch.dtype]


@dataclass(frozen=True)
class SourceBlock:
    """A block of a canonical tensor, whose elements lie row by row from element `start` of a stored tensor."""

    name: str
    block: Block
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an output file: the blocks it is made of, or a constant."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[SourceBlock, ...]
    constant: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """One file to write.

    Attributes:
        path: relative to the target directory.
        wrap: for kind "torch", makes the object to save out of {name: tensor}.
    """

    path: Path
    kind: Literal["torch", "safetensors"]
    tensors: tuple[StoredTensor, ...]
    wrap: Callable[[dict[str, Any]], Any] = field(default=lambda tensors: tensors)

    @property
    def num_bytes(self) -> int:
        """Size of its tensors' data."""
        return sum(stored.num_bytes for stored in self.tensors)


def pipeline_stages(num_layers: int, stages: int, first: int | None = None, last: int | None = None) -> list[range]:
    """The layers of each pipeline stage; the first and the last may hold another number than the others.

    Raises:
        UserError: the layers cannot be divided so.
    """
    if stages == 1 and first is not None and last is not None and first != last:
        raise UserError(f"one pipeline stage cannot hold {first} layers as the first and {last} as the last")
    counts: list[int | None] = [None] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    given, others = sum(count or 0 for count in counts), counts.count(None)
    rest = num_layers - given
    if any(count is not None and count < 1 for count in counts) or (
        rest if others == 0 else rest % others or rest < others
    ):
        raise UserError(
            f"{num_layers} layers cannot be divided into {stages} pipeline stages"
            + (f" with {first} in the first" if first is not None else "")
            + (f" and {last} in the last" if last is not None else "")
            + (
                "; all others hold equally many"
                if given
                else f": {num_layers} % {stages} = {num_layers % stages}; "
                "use --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
            )
        )
    ranges, start = [], 0
    for count in counts:
        size = rest // others if count is None else count
        ranges.append(range(start, start + size))
        start += size
    return ranges


def megatron_files(config: OPTConfig, dtype_of: DtypeOf, tp: int, stages: Sequence[range]) -> list[OutputFile]:
    """Megatron-LM's release directory, a file for each rank."""
    shapes = canonical_shapes(config)
    files = []
    for stage, layers in enumerate(stages):
        rows = stage_parameters(config, layers, first=stage == 0, last=stage == len(stages) - 1)
        for rank in range(tp):
            tensors = tuple(_megatron_tensor(row, config, shapes, dtype_of, rank, tp) for row in rows)
            folder = Path("release") / rank_directory(rank, stage, len(stages))
            files.append(
                OutputFile(folder / RANK_FILE, "torch", tensors, _megatron_wrap(config, tensors, tp, len(stages)))
            )
    return files


def _megatron_wrap(
    config: OPTConfig, tensors: tuple[StoredTensor, ...], tp: int, pp: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    arguments = megatron_args(config, tensors[0].dtype, tp, pp)
    return lambda model: {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "model": model}


def _megatron_tensor(
    row: Parameter, config: OPTConfig, shapes: dict[str, tuple[int, ...]], dtype_of: DtypeOf, rank: int, ranks: int
) -> StoredTensor:
    blocks = [rank_block(shapes[name], row.split, rank, ranks) for name in row.canonical]
    sizes = _sizes(blocks[0])
    shape = (sizes[0] * len(blocks), *sizes[1:])
    if len(blocks) == 1:
        parts = (SourceBlock(row.canonical[0], blocks[0]),)
    else:  # q, k, v of every head in turn
        run = config.head_dim * torch.Size(sizes[1:]).numel()
        parts = tuple(
            SourceBlock(name, _head_of(block, head, config.head_dim), (head * len(blocks) + part) * run)
            for head in range(sizes[0] // config.head_dim)
            for part, (name, block) in enumerate(zip(row.canonical, blocks, strict=True))
        )
    return StoredTensor(row.megatron, shape, dtype_of(row.canonical[0]), parts)


def _head_of(block: Block, head: int, head_dim: int) -> Block:
    start = block[0].start + head * head_dim
    return (slice(start, start + head_dim), *block[1:])


def huggingface_files(config: OPTConfig, dtype_of: DtypeOf, max_shard_bytes: int) -> list[OutputFile]:
    """Safetensors as transformers writes them: one file, or shards of at most `max_shard_bytes` each."""
    tensors = [
        StoredTensor(name, shape, dtype_of(name), (SourceBlock(name, whole(shape)),))
        for name, shape in canonical_shapes(config).items()
    ]
    shards: list[list[StoredTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    if len(shards) == 1:
        return [OutputFile(Path("model.safetensors"), "safetensors", tuple(tensors))]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return [OutputFile(Path(n), "safetensors", tuple(shard)) for n, shard in zip(names, shards, strict=True)]


def metaseq_files(config: OPTConfig, dtype_of: DtypeOf, parts: int) -> list[OutputFile]:
    """metaseq's unflattened parts, with the fused [K; V; Q]; 350m as the one file that Meta released.

    Raises:
        UserError: 350m in several parts, which metaseq has no form for.
    """
    separate = config.has_embedding_projection or not config.do_layer_norm_before
    if separate and parts > 1:
        raise UserError(f"metaseq has post-norm OPT as one file only; ask for 1 part instead of {parts}")
    files = []
    for part in range(parts):
        tensors = tuple(_metaseq_tensors(config, dtype_of, part, parts, fused=not separate))
        name = "reshard.pt" if separate else f"reshard-model_part-{part}.pt"
        files.append(OutputFile(Path(name), "torch", tensors, _metaseq_wrap(config, parts)))
    return files


def _metaseq_tensors(config: OPTConfig, dtype_of: DtypeOf, part: int, parts: int, *, fused: bool) -> list[StoredTensor]:
    # Loaders of the time dropped the final norm of files without a version.
    version = torch.tensor([3.0])
    stored = [StoredTensor("decoder.version", (1,), torch.float32, (), version)]
    theirs = {ours: name for name, ours in METASEQ_NAMES.items()}
    for name, shape in canonical_shapes(config).items():
        module, _, kind = name.removeprefix(PREFIX).rpartition(".")
        block = rank_block(shape, split_of(name), part, parts)
        if fused and module.endswith("q_proj"):
            stored.append(_metaseq_qkv(module.removesuffix("q_proj"), kind, block, dtype_of(name)))
        elif not fused or not module.endswith(("k_proj", "v_proj")):
            label = f"decoder.{theirs.get(module, module)}.{kind}"
            stored.append(StoredTensor(label, _sizes(block), dtype_of(name), (SourceBlock(name, block),)))
    return stored


def _metaseq_qkv(attention: str, kind: str, block: Block, dtype: torch.dtype) -> StoredTensor:
    size = torch.Size(_sizes(block)).numel()
    parts = tuple(
        SourceBlock(f"{PREFIX}{attention}{letter}_proj.{kind}", block, number * size)
        for number, letter in enumerate("kvq")
    )
    rows, others = _sizes(block)[0], _sizes(block)[1:]
    return StoredTensor(f"decoder.{attention}qkv_proj.{kind}", (3 * rows, *others), dtype, parts)


def _metaseq_wrap(config: OPTConfig, parts: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    model = argparse.Namespace(
        arch="transformer_lm_megatron",
        model_parallel_size=parts,
        decoder_layers=config.num_layers,
        decoder_embed_dim=config.hidden_size,
        decoder_ffn_embed_dim=config.ffn_hidden_size,
        decoder_attention_heads=config.num_attention_heads,
        decoder_input_dim=config.word_embed_proj_dim,
        decoder_output_dim=config.word_embed_proj_dim,
        decoder_learned_pos=True,
        decoder_normalize_before=config.do_layer_norm_before,
        max_target_positions=config.max_position_embeddings,
        activation_fn="relu",
        share_decoder_input_output_embed=True,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )
    rest = {"cfg": {"_name": None, "model": model}, "args": None, "criterion": None, "extra_state": {}}
    return lambda tensors: rest | {"optimizer_history": [], "task_state": {}, "model": tensors}


def flagai_files(config: OPTConfig, dtype_of: DtypeOf, parts: int) -> list[OutputFile]:
    """FlagAI's pytorch_model.bin, or a numbered file for each part with the whole output head in every one."""
    files = []
    for part in range(parts):
        tensors = []
        for name, shape in canonical_shapes(config).items():
            block = rank_block(shape, split_of(name) if parts > 1 else Split.REPLICATED, part, parts)
            tensors.append(StoredTensor(name, _sizes(block), dtype_of(name), (SourceBlock(name, block),)))
        shape = canonical_shapes(config)[EMBEDDING]
        tensors.append(
            StoredTensor("lm_head.weight", shape, dtype_of(EMBEDDING), (SourceBlock(EMBEDDING, whole(shape)),))
        )
        path = Path(f"pytorch_model_{part:02d}.bin" if parts > 1 else "pytorch_model.bin")
        wrap = (lambda tensors: {"module": tensors}) if parts > 1 else (lambda tensors: tensors)
        files.append(OutputFile(path, "torch", tuple(tensors), wrap))
    return files


def _sizes(block: Block) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in block)
