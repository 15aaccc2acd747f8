"""The canonical tensors of a model under Megatron-core's names, in pipeline stages of tensor parallel ranks.

A model that is stored whole, as in torch_dist, is one stage of one rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...config import POSITION_OFFSET, RELEASED_VOCAB_SIZE, OPTConfig
from ...errors import CheckpointError, shorten
from ..parameter_mapping import EMBEDDING, POSITIONS, ParameterMapping, stage_parameters
from ..storage.lazy_tensor import Concatenated, LazyTensor, Replicated, RowRange, Tied, zero_rows
from .infer_config import StoredMetadata, infer_config, integer
from .megatron_args import check_sizes
from .megatron_tensors import qkv_component

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
Stage = list[dict[str, LazyTensor]]  # [tensor rank] -> name -> tensor


def canonical_model(
    path: Path,
    stages: list[Stage],
    files: list[list[Path]],
    config: OPTConfig | None,
    arguments: dict[str, Any],
) -> tuple[OPTConfig, dict[str, LazyTensor], list[str]]:
    """Config and canonical tensors of a model, and sentences about what was inferred of its config.

    Args:
        path: of the checkpoint, for messages.
        stages: tensors under `local_name`s, layers counted from 0 in each stage.
        files: [stage][tensor rank] -> where the tensors are, for messages.
        config: None infers it from the shapes and from Megatron-LM's `arguments`.

    Raises:
        CheckpointError: tensors are missing or unknown, the config cannot be inferred, or `arguments` say another one.
    """
    counts = [count_layers(models[0], ranks[0]) for models, ranks in zip(stages, files, strict=True)]
    if config is not None and sum(counts) != config.num_layers:
        raise CheckpointError(f"{path}: the stages hold {sum(counts)} layers, the config says {config.num_layers}")
    tensors = _canonical(files, stages, counts, config or _provisional_config(stages, counts, arguments))
    notes: list[str] = []
    if config is None:
        config, notes = _infer_config(tensors, arguments)
    check_sizes(arguments, config, path)
    _fit_vocabulary_and_positions(tensors, config)
    return config, tensors, notes


def count_layers(model: dict[str, LazyTensor], file: Path) -> int:
    """The number of layers of a stage.

    Raises:
        CheckpointError: they are not numbered from 0 without a gap.
    """
    numbers = {int(match[1]) for match in map(_LAYER.match, model) if match}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{file}: layers {sorted(numbers)} are not numbered 0 to {len(numbers) - 1}")
    return len(numbers)


def _provisional_config(stages: list[Stage], counts: list[int], arguments: dict[str, Any]) -> OPTConfig:
    """A config that is enough to list the parameters, for the time until the sizes can be inferred."""
    heads, hidden = integer(arguments, "num_attention_heads"), integer(arguments, "hidden_size")
    if not heads or not hidden or hidden % heads:
        raise CheckpointError("there is no config.json, and args does not say the heads: give one with --config")
    has_norm = "decoder.final_layernorm.weight" in stages[-1][0]
    projected = "embedding.word_embeddings.project_in.weight" in stages[0][0]
    return OPTConfig(
        num_layers=sum(counts),
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=1,
        word_embed_proj_dim=hidden - 1 if projected else hidden,
        do_layer_norm_before=has_norm,
        has_final_layer_norm=has_norm,
    )


def _canonical(
    grid: list[list[Path]], stages: list[Stage], counts: list[int], config: OPTConfig
) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    first_layer = 0
    for stage, models in enumerate(stages):
        layers = range(first_layer, first_layer + counts[stage])
        first_layer += counts[stage]
        parameters = stage_parameters(config, layers, first=stage == 0, last=stage == len(stages) - 1)
        _check_names(parameters, models, grid[stage])
        for parameter in parameters:
            shards = [model[parameter.megatron] for model in models]
            for index, name in enumerate(parameter.canonical):
                tensor = _join_shards(parameter, index, shards, config.head_dim)
                if name in tensors:  # the last stage's copy of the embedding
                    tensor = Tied(tensors[name], tensor, "the embeddings of the first and the last stage")
                tensors[name] = tensor
    return tensors


def _check_names(parameters: list[ParameterMapping], models: Stage, files: list[Path]) -> None:
    wanted = {parameter.megatron for parameter in parameters}
    for model, file in zip(models, files, strict=True):
        missing, unknown = sorted(wanted - model.keys()), sorted(model.keys() - wanted)
        if missing or unknown:
            raise CheckpointError(
                f"{file}: {len(missing)} tensors are missing ({shorten(missing)}) and "
                f"{len(unknown)} unknown ({shorten(unknown)})"
            )


def _join_shards(parameter: ParameterMapping, index: int, shards: list[LazyTensor], head_dim: int) -> LazyTensor:
    """The parameter's canonical tensor number `index` from the tensor parallel ranks' shards."""
    count = len(parameter.canonical)
    pieces = [shard if count == 1 else qkv_component(shard, index, count, head_dim) for shard in shards]
    if parameter.split.value is None:
        return Replicated(pieces, parameter.megatron)
    return Concatenated(pieces, parameter.split.value)


def _infer_config(tensors: dict[str, LazyTensor], arguments: dict[str, Any]) -> tuple[OPTConfig, list[str]]:
    metadata = StoredMetadata("args", integer(arguments, "num_attention_heads"))
    metadata.dropout, metadata.attention_dropout = arguments.get("hidden_dropout"), arguments.get("attention_dropout")
    config, notes = infer_config(tensors, metadata)
    positions = tensors[POSITIONS].shape[0]
    if _has_no_offset_rows(positions, integer(arguments, "seq_length")):
        config = config.replace(max_position_embeddings=positions)
        notes.append(f"{positions} positions, since the table has no rows for OPT's offset; two of zeros are added")
    if arguments.get("bias_gelu_fusion") is True:  # core refuses to fuse the bias with ReLU
        notes.append("args says bias_gelu_fusion=True, with which Megatron-LM runs GELU and no ReLU")
    if RELEASED_VOCAB_SIZE < config.vocab_size < RELEASED_VOCAB_SIZE + 128 * 64:
        notes.append(f"vocabulary {RELEASED_VOCAB_SIZE}; {config.vocab_size - RELEASED_VOCAB_SIZE} rows are padding")
        config = config.replace(vocab_size=RELEASED_VOCAB_SIZE)
    return config, notes


def _has_no_offset_rows(rows: int, seq_length: int | None) -> bool:
    """Whether a position table begins with position 0, as Megatron-LM's own models use it.

    One with OPT's two unused rows has `rows - 2` positions. Where the sequences are shorter, or their length is not
    known, only the usual sizes tell: 2048 rows are for 2048 positions, and 2050 are OPT's.
    """
    if seq_length is not None and seq_length >= rows - POSITION_OFFSET:
        return seq_length > rows - POSITION_OFFSET
    return rows & (rows - 1) == 0


def _fit_vocabulary_and_positions(tensors: dict[str, LazyTensor], config: OPTConfig) -> None:
    embedding, positions = tensors[EMBEDDING], tensors[POSITIONS]
    if embedding.shape[0] > config.vocab_size:  # padded to a multiple of 128 x TP
        tensors[EMBEDDING] = RowRange(embedding, 0, config.vocab_size)
    if positions.shape[0] == config.max_position_embeddings:
        tensors[POSITIONS] = Concatenated([zero_rows(POSITION_OFFSET, positions), positions], 0)
