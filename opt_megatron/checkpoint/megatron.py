"""Megatron-LM's directory layout: reader at any TP x PP, and writer.

    DIR/latest_checkpointed_iteration.txt       "release", or an iteration's number
    DIR/release/mp_rank_{tp:02d}/model_optim_rng.pt               without pipeline parallelism
    DIR/release/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt      with it
    DIR/config.json and the tokenizer's files                     this project's addition

A file holds {"args": Namespace, "checkpoint_version": 3.0, "iteration": int, "model": {name: tensor}}
(Megatron-LM, megatron/training/checkpointing.py).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import OPTConfig
from ..errors import CheckpointError, shorten
from .pickles import MappedTensors
from .sources import Block, Source, concatenated
from .table import Parameter, part_view, stage_parameters
from .view import Checkpoint

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_RANK_DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def is_megatron(directory: Path) -> bool:
    """Whether the directory holds Megatron-LM's tracker file."""
    return (directory / TRACKER).is_file()


def rank_directory(tp_rank: int, pp_rank: int, pipeline_stages: int) -> str:
    """Megatron-LM's name for one rank's directory."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pipeline_stages > 1 else "")


def open_megatron(directory: Path) -> Checkpoint:
    """Open a directory lazily, whatever layout it was written for.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or the ranks do not fit each other.
    """
    config = OPTConfig.from_directory(directory)
    grid = _rank_files(_iteration_directory(directory))
    tp, pp = len(grid[0]), len(grid)
    stages = [[_model_of(file) for file in row] for row in grid]
    counts = [_count_layers(row[0], grid[stage][0]) for stage, row in enumerate(stages)]
    if sum(counts) != config.num_layers:
        raise CheckpointError(f"{directory}: the stages hold {sum(counts)} layers, the config says {config.num_layers}")
    tensors: dict[str, Source] = {}
    first_layer = 0
    for stage, models in enumerate(stages):
        layers = range(first_layer, first_layer + counts[stage])
        first_layer += counts[stage]
        parameters = stage_parameters(config, layers, first=stage == 0, last=stage == pp - 1)
        _check_names(parameters, models, grid[stage])
        for parameter in parameters:
            shards = [model[parameter.megatron] for model in models]
            for part, name in enumerate(parameter.canonical):
                source = _assembled(parameter, part, shards, config.head_dim)
                tensors.setdefault(name, source)  # the last stage's copy of the embedding comes second
    return Checkpoint(directory, f"Megatron TP{tp} x PP{pp}", config, tensors)


def _iteration_directory(directory: Path) -> Path:
    word = (directory / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and not word.isdigit():
        raise CheckpointError(f"{directory / TRACKER}: says {word[:40]!r}, neither 'release' nor a number")
    path = directory / (word if word == "release" else f"iter_{int(word):07d}")
    if not path.is_dir():
        raise CheckpointError(f"{directory}: {TRACKER} says {word!r}, but there is no directory {path.name}")
    return path


def _rank_files(directory: Path) -> list[list[Path]]:
    """[pipeline stage][tensor rank] -> file, with no rank missing."""
    found: dict[tuple[int, int], Path] = {}
    for child in sorted(directory.iterdir()):
        match = _RANK_DIRECTORY.fullmatch(child.name)
        if match and (child / RANK_FILE).is_file():
            found[int(match[2] or 0), int(match[1])] = child / RANK_FILE
    if not found:
        raise CheckpointError(f"{directory}: holds no mp_rank_*/{RANK_FILE}")
    stages, ranks = 1 + max(pp for pp, _ in found), 1 + max(tp for _, tp in found)
    missing = [rank_directory(tp, pp, stages) for pp in range(stages) for tp in range(ranks) if (pp, tp) not in found]
    if missing:
        raise CheckpointError(f"{directory}: {len(found)} rank files are there, missing are {shorten(missing)}")
    return [[found[pp, tp] for tp in range(ranks)] for pp in range(stages)]


def _model_of(file: Path) -> dict[str, Source]:
    mapped = MappedTensors(file)
    content = mapped.content
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: has no 'model' dictionary, so it is not a Megatron checkpoint")
    # Transformer Engine's bookkeeping may be stored beside the weights.
    return {
        name: mapped.source(value)
        for name, value in model.items()
        if isinstance(value, Tensor) and "_extra_state" not in name
    }


def _count_layers(model: dict[str, Source], file: Path) -> int:
    numbers = {int(match[1]) for match in map(_LAYER.match, model) if match}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{file}: layers {sorted(numbers)} are not numbered 0 to {len(numbers) - 1}")
    return len(numbers)


def _check_names(parameters: list[Parameter], models: list[dict[str, Source]], files: list[Path]) -> None:
    wanted = {parameter.megatron for parameter in parameters}
    for model, file in zip(models, files, strict=True):
        missing, unknown = sorted(wanted - model.keys()), sorted(model.keys() - wanted)
        if missing or unknown:
            raise CheckpointError(
                f"{file}: {len(missing)} tensors are missing ({shorten(missing)}) and "
                f"{len(unknown)} unknown ({shorten(unknown)})"
            )


def _assembled(parameter: Parameter, part: int, shards: list[Source], head_dim: int) -> Source:
    """One canonical tensor out of the tensor parallel ranks' shards."""
    parts = len(parameter.canonical)
    pieces = [shard if parts == 1 else _interleaved_part(shard, part, parts, head_dim) for shard in shards]
    if parameter.split.value is None:
        return pieces[0]
    return concatenated(pieces, parameter.split.value)


def _interleaved_part(shard: Source, part: int, parts: int, head_dim: int) -> Source:
    rows, others = shard.shape[0], shard.shape[1:]
    if rows % (parts * head_dim):
        return shard  # left to check_tensors, which names the tensor: its rows cannot be whole heads

    def fetch(block: Block) -> Tensor:
        wanted, rest = block[0], block[1:]
        first, stop = wanted.start // head_dim, -(-wanted.stop // head_dim)  # the heads that hold these rows
        per_head = parts * head_dim
        heads = shard.fetch((slice(first * per_head, stop * per_head), *rest))
        flat = part_view(heads, part, parts, head_dim).flatten(0, 1)
        return flat[wanted.start - first * head_dim : wanted.stop - first * head_dim]

    return Source((rows // parts, *others), shard.dtype, fetch, shard.release)


def write_rank(
    directory: Path,
    model: dict[str, Tensor],
    config: OPTConfig,
    dtype: torch.dtype,
    layout: tuple[int, int],
    rank: tuple[int, int],
) -> None:
    """Write one rank's file under `directory/release`.

    Args:
        layout: tensor and pipeline parallel size.
        rank: tensor and pipeline parallel rank.
    """
    (tp, pp), (tp_rank, pp_rank) = layout, rank
    folder = directory / "release" / rank_directory(tp_rank, pp_rank, pp)
    folder.mkdir(parents=True)
    content = {
        "args": megatron_args(config, dtype, tp, pp),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "model": model,
    }
    torch.save(content, folder / RANK_FILE)


def megatron_args(config: OPTConfig, dtype: torch.dtype, tp: int, pp: int) -> argparse.Namespace:
    """The arguments that Megatron-LM compares on loading (primitive values only).

    They cannot say that OPT's activation is ReLU: Megatron-LM's command line has no such choice and its
    files do not carry one. Its `pretrain_gpt.py` needs `config.activation_func = torch.nn.functional.relu`.
    """
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.num_position_rows,  # rows of the table, OPT's two unused ones too
        "position_embedding_type": "learned_absolute",
        "add_position_embedding": True,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "swiglu": False,
        "squared_relu": False,
        "openai_gelu": False,
        "untie_embeddings_and_output_weights": False,
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "padded_vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "ckpt_format": "torch",
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }
    return argparse.Namespace(**values)
