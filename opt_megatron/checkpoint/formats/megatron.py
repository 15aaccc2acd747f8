"""Megatron-LM's directory layout, at any TP x PP: this project's and plain GPT checkpoints of OPT.

    DIR/latest_checkpointed_iteration.txt       "release", or an iteration's number
    DIR/release/mp_rank_{tp:02d}/model_optim_rng.pt               without pipeline parallelism
    DIR/release/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt      with it
    DIR/config.json and the tokenizer's files                     this project's addition

A file holds {"args": Namespace, "checkpoint_version": 3.0, "iteration": int, "model": {name: tensor}}
(Megatron-LM, megatron/training/checkpointing.py). Plain Megatron-LM pads the vocabulary, may have left out
the position table's two unused rows, and names norms differently with TransformerEngine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...config import POSITION_OFFSET, RELEASED_VOCAB_SIZE, OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile
from ..parameter_mapping import EMBEDDING, POSITIONS, ParameterMapping, canonical_shapes, stage_parameters
from ..storage.lazy_tensor import Concatenated, LazyTensor, Replicated, RowRange, Tied, zero_rows
from ..storage.torch_reader import TorchFile
from .format import OutputFormat
from .infer_config import StoredMetadata, directory_config, infer_config, integer, namespace_values
from .megatron_args import check_arguments, megatron_args
from .megatron_ranks import RANK_FILE, TRACKER, iteration_directory, pipeline_stages, rank_directory, rank_files
from .megatron_tensors import qkv_component, stored_tensor
from .model_parallel_parts import check_no_duplicates

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# TransformerEngine's fused modules contain the norm that comes before them.
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_Stage = list[dict[str, LazyTensor]]  # [tensor rank] -> name -> tensor


class MegatronFormat(OutputFormat):
    """A file for each tensor x pipeline parallel rank, under Megatron-core's names."""

    title = "Megatron"
    detection_rank = 20  # Hugging Face's files may be there too
    file_names = r"latest_checkpointed_iteration\.txt|release|iter_\d+"
    has_pipeline_stages = True

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds Megatron-LM's tracker file."""
        return (directory / TRACKER).is_file()

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily, whatever layout it was written for, with even pipeline stages or not.

        Args:
            config: instead of the directory's config.json; where there is neither, one is inferred from the
                shapes and Megatron-LM's `args`.

        Raises:
            CheckpointError: a rank's file is missing or damaged, or the ranks do not fit each other.
        """
        config = config or directory_config(path)
        grid = rank_files(iteration_directory(path))
        tp, pp = len(grid[0]), len(grid)
        opened = [[TorchFile(file) for file in files] for files in grid]
        stages = [[_model_of(file) for file in files] for files in opened]
        arguments = namespace_values(opened[0][0].content.get("args"))
        check_arguments(arguments, path, tp, pp)
        _check_no_duplicates(stages, path)
        counts = [_count_layers(models[0], files[0]) for models, files in zip(stages, grid, strict=True)]
        if config is not None and sum(counts) != config.num_layers:
            raise CheckpointError(f"{path}: the stages hold {sum(counts)} layers, the config says {config.num_layers}")
        tensors = _canonical(grid, stages, counts, config or _provisional_config(stages, counts, arguments))
        notes: list[str] = []
        if config is None:
            config, notes = _infer_config(tensors, arguments)
        _fit_vocabulary_and_positions(tensors, config)
        ranks = _describe_ranks(grid, stages, counts)
        return Checkpoint(path, f"Megatron TP{tp} x PP{pp}", config, tensors, notes, ranks)

    def output_files(self, config: OPTConfig, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """Megatron-LM's release directory, a file for each rank.

        Raises:
            UserError: the layers cannot be divided into the pipeline stages.
        """
        tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
        first, last = options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers
        shapes = canonical_shapes(config)
        files = []
        for stage, layers in enumerate(pipeline_stages(config.num_layers, pp, first, last)):
            parameters = stage_parameters(config, layers, first=stage == 0, last=stage == pp - 1)
            for rank in range(tp):
                tensors = tuple(stored_tensor(p, shapes, config.head_dim, dtype_of, rank, tp) for p in parameters)
                path = Path("release") / rank_directory(rank, stage, pp) / RANK_FILE
                files.append(OutputFile(path, "torch", tensors, _wrap_model(config, tensors[0].dtype, tp, pp)))
        return files

    def text_files(self, files: list[OutputFile]) -> dict[str, str]:
        """The tracker, which says where the ranks' directories are."""
        return {TRACKER: "release\n"}

    def describe_output(self, options: ConversionOptions) -> str:
        """The layout, as "Megatron TP2 x PP4"."""
        return f"Megatron TP{options.tensor_model_parallel_size} x PP{options.pipeline_model_parallel_size}"

    def notes(self, config: OPTConfig, options: ConversionOptions) -> list[str]:
        """Which layouts the directory loads at, if its stages are uneven."""
        if config.num_layers % options.pipeline_model_parallel_size == 0:
            return []
        sizes = f"sizes that divide {config.num_layers}"
        return [f"stages of unequal length are for Megatron-LM; here the directory loads at {sizes}"]


FORMAT = MegatronFormat()


# Reading


def _model_of(file: TorchFile) -> dict[str, LazyTensor]:
    stored = file.model("Megatron").items()
    return {_local_name(name): tensor for name, tensor in stored if "_extra_state" not in name}


def _local_name(name: str) -> str:
    for theirs, ours in _TE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _check_no_duplicates(stages: list[_Stage], directory: Path) -> None:
    matrices = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj")
    names = [f"decoder.layers.0.{matrix}.weight" for matrix in matrices]
    ranks = [[model[name] for name in names if name in model] for models in stages for model in models]
    check_no_duplicates(ranks, f"{directory}: ranks")


def _count_layers(model: dict[str, LazyTensor], file: Path) -> int:
    numbers = {int(match[1]) for match in map(_LAYER.match, model) if match}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{file}: layers {sorted(numbers)} are not numbered 0 to {len(numbers) - 1}")
    return len(numbers)


def _provisional_config(stages: list[_Stage], counts: list[int], arguments: dict[str, Any]) -> OPTConfig:
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
    grid: list[list[Path]], stages: list[_Stage], counts: list[int], config: OPTConfig
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


def _check_names(parameters: list[ParameterMapping], models: _Stage, files: list[Path]) -> None:
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
    positions = integer(arguments, "max_position_embeddings")
    if positions == tensors[POSITIONS].shape[0] and positions & (positions - 1) == 0:
        # 2048 rows for 2048 positions: a table without the two rows that OPT never uses.
        config = config.replace(max_position_embeddings=positions)
        notes.append(f"{positions} positions, since the table has no rows for OPT's offset; two of zeros are added")
    if RELEASED_VOCAB_SIZE < config.vocab_size < RELEASED_VOCAB_SIZE + 128 * 64:
        notes.append(f"vocabulary {RELEASED_VOCAB_SIZE}; {config.vocab_size - RELEASED_VOCAB_SIZE} rows are padding")
        config = config.replace(vocab_size=RELEASED_VOCAB_SIZE)
    return config, notes


def _fit_vocabulary_and_positions(tensors: dict[str, LazyTensor], config: OPTConfig) -> None:
    embedding, positions = tensors[EMBEDDING], tensors[POSITIONS]
    if embedding.shape[0] > config.vocab_size:  # padded to a multiple of 128 x TP
        tensors[EMBEDDING] = RowRange(embedding, 0, config.vocab_size)
    if positions.shape[0] == config.max_position_embeddings:
        tensors[POSITIONS] = Concatenated([zero_rows(POSITION_OFFSET, positions), positions], 0)


def _describe_ranks(grid: list[list[Path]], stages: list[_Stage], counts: list[int]) -> list[tuple[str, str]]:
    described, first = [], 0
    for files, models, count in zip(grid, stages, counts, strict=True):
        for file, model in zip(files, models, strict=True):
            size = sum(tensor.num_bytes for tensor in model.values())
            described.append((file.parent.name, f"layers {first}-{first + count - 1}, {size / 1e6:,.1f} MB"))
        first += count
    return described


# Writing


def _wrap_model(config: OPTConfig, dtype: torch.dtype, tp: int, pp: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    rest = {"args": megatron_args(config, dtype, tp, pp), "checkpoint_version": 3.0, "iteration": 0}
    return lambda model: rest | {"model": model}
