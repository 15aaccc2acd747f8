"""Megatron-LM's directory layout, at any TP x PP: this project's and plain GPT checkpoints of OPT.

    DIR/latest_checkpointed_iteration.txt       "release", or an iteration's number
    DIR/release/mp_rank_{tp:02d}/model_optim_rng.pt               without pipeline parallelism
    DIR/release/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt      with it
    DIR/config.json and the tokenizer's files                     this project's addition

A file holds {"args": Namespace, "checkpoint_version": 3.0, "iteration": int, "model": {name: tensor}}
(Megatron-LM, megatron/training/checkpointing.py). Plain Megatron-LM pads the vocabulary, names norms differently with
TransformerEngine, and with a virtual pipeline has `model0`, `model1` ... in place of `model`: chunk v of stage p holds
the layers of virtual stage v * PP + p.

A sequence begins at row 2 of OPT's position table. Megatron-LM's position ids begin at 0: for it the table is written
without rows 0 and 1 (`--position-offset 0`), or its model builder adds 2. Both tables are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...config import POSITION_OFFSET, OPTConfig
from ...errors import CheckpointError
from ...model.parameter_names import local_name
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile, StoredTensor
from ..parameter_mapping import POSITIONS, canonical_shapes, stage_parameters
from ..storage.lazy_tensor import Concatenated, LazyTensor, RowRange, zero_rows
from ..storage.torch_reader import TorchFile
from .format import OutputFormat
from .infer_config import directory_config, namespace_values
from .megatron_args import check_arguments, check_layout, megatron_args
from .megatron_ranks import RANK_FILE, TRACKER, iteration_directory, pipeline_stages, rank_directory, rank_files
from .megatron_stages import Stage, canonical_model, count_layers
from .megatron_tensors import stored_tensor
from .model_parallel_parts import check_no_duplicates


class MegatronFormat(OutputFormat):
    """A file for each tensor x pipeline parallel rank, under Megatron-core's names."""

    title = "Megatron"
    detection_rank = 20  # Hugging Face's files may be there too
    file_names = r"latest_checkpointed_iteration\.txt|((release|iter_\d+)/)?mp_rank_\d+(_\d+)?/model_optim_rng\.pt"
    has_pipeline_stages = True
    position_offsets = (0, POSITION_OFFSET)

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds Megatron-LM's tracker file, or is that of one iteration."""
        return (directory / TRACKER).is_file() or any(directory.glob(f"mp_rank_*/{RANK_FILE}"))

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily, whatever layout it was written for, with even pipeline stages or not.

        Args:
            config: instead of the config.json beside the tracker or in the iteration's directory; where there is
                none, one is inferred from the shapes and Megatron-LM's `args`.

        Raises:
            CheckpointError: a rank's file is missing or damaged, or the ranks do not fit each other.
        """
        directory = iteration_directory(path) if (path / TRACKER).is_file() else path
        config = config or directory_config(directory) or directory_config(directory.parent)
        grid = rank_files(directory)
        tp, pp = len(grid[0]), len(grid)
        opened = [[TorchFile(file) for file in files] for files in grid]
        chunks = [[_chunks_of(file) for file in files] for files in opened]
        count = _number_of_chunks(chunks, path)
        # Chunk after chunk, in each of them stage after stage: these are the stages in the order of their layers.
        stages = [[models[chunk] for models in stage] for chunk in range(count) for stage in chunks]
        arguments = namespace_values(opened[0][0].content.get("args"))
        check_arguments(arguments, path)
        check_layout(arguments, path, tp, pp)
        _check_no_duplicates(stages, f"{path}: " + ("virtual pipeline stages" if count > 1 else "ranks"))
        config, tensors, notes = canonical_model(path, stages, grid * count, config, arguments)
        description = f"Megatron TP{tp} x PP{pp}" + (f", virtual pipeline of {count} chunks" if count > 1 else "")
        return Checkpoint(path, description, config, tensors, notes, _describe_ranks(grid, stages))

    def content(self, checkpoint: Checkpoint, options: ConversionOptions) -> Checkpoint:
        """With zeros in the rows of positions that are not written, as they are read again and hashed."""
        unused, table = POSITION_OFFSET - options.position_offset, checkpoint.tensors[POSITIONS]
        if unused == 0:
            return checkpoint
        rows = Concatenated([zero_rows(unused, table), RowRange(table, unused, table.shape[0])], 0)
        return replace(checkpoint, tensors=checkpoint.tensors | {POSITIONS: rows})

    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """Megatron-LM's release directory, a file for each rank.

        Raises:
            UserError: the layers cannot be divided into the pipeline stages.
        """
        tp, pp = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
        first, last = options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers
        config = checkpoint.config
        shapes = canonical_shapes(config)
        files = []
        unused = POSITION_OFFSET - options.position_offset
        for stage, layers in enumerate(pipeline_stages(config.num_layers, pp, first, last)):
            parameters = stage_parameters(config, layers, first=stage == 0, last=stage == pp - 1)
            for rank in range(tp):
                tensors = [stored_tensor(p, shapes, config.head_dim, dtype_of, rank, tp) for p in parameters]
                if stage == 0 and unused:
                    tensors = [_without_rows(tensor, unused) for tensor in tensors]
                path = Path("release") / rank_directory(rank, stage, pp) / RANK_FILE
                files.append(OutputFile(path, "torch", tuple(tensors), _wrap_model(config, tensors[0].dtype, options)))
        return files

    def text_files(self, checkpoint: Checkpoint, files: list[OutputFile]) -> dict[str, str]:
        """The tracker, which says where the ranks' directories are."""
        return {TRACKER: "release\n"}

    def describe_output(self, options: ConversionOptions) -> str:
        """The layout, as "Megatron TP2 x PP4"."""
        return f"Megatron TP{options.tensor_model_parallel_size} x PP{options.pipeline_model_parallel_size}"

    def notes(self, config: OPTConfig, options: ConversionOptions) -> list[str]:
        """What no argument of Megatron-LM can say, and which layouts load the directory if its stages are uneven."""
        offset = options.position_offset
        how = f" (add {offset} to its own, or write with --position-offset 0)" if offset else ""
        notes = [
            f"for Megatron-LM: position ids begin at {offset}{how}, "
            "and the activation is ReLU (config.activation_func = torch.nn.functional.relu)"
        ]
        if config.num_layers % options.pipeline_model_parallel_size:
            sizes = f"sizes that divide {config.num_layers}"
            notes.append(f"stages of unequal length are for Megatron-LM; here the directory loads at {sizes}")
        return notes


FORMAT = MegatronFormat()


# Reading


def _chunks_of(file: TorchFile) -> list[dict[str, LazyTensor]]:
    """The tensors of a rank under their `local_name`s: of `model`, or of each chunk of a virtual pipeline."""
    content = file.content if isinstance(file.content, dict) else {}
    chunks = itertools.takewhile(content.__contains__, (f"model{number}" for number in itertools.count()))
    stored = [file.model("Megatron", key) for key in chunks] or [file.model("Megatron")]
    return [
        {local_name(name): tensor for name, tensor in model.items() if "_extra_state" not in name} for model in stored
    ]


def _number_of_chunks(chunks: list[list[list[dict[str, LazyTensor]]]], path: Path) -> int:
    """The number of chunks of each rank, [stage][tensor rank][chunk] -> tensors.

    Raises:
        CheckpointError: it is not the same for all ranks.
    """
    counts = {len(models) for stage in chunks for models in stage}
    if len(counts) > 1:
        raise CheckpointError(f"{path}: the ranks hold {sorted(counts)} chunks of a virtual pipeline each")
    return counts.pop()


def _check_no_duplicates(stages: list[Stage], where: str) -> None:
    matrices = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj")
    names = [f"decoder.layers.0.{matrix}.weight" for matrix in matrices]
    ranks = [[model[name] for name in names if name in model] for models in stages for model in models]
    check_no_duplicates(ranks, where)


def _describe_ranks(grid: list[list[Path]], stages: list[Stage]) -> list[tuple[str, str]]:
    """Name and content of every rank; of a virtual pipeline, `stages` are those of one chunk after another."""
    counts = [count_layers(models[0], grid[stage % len(grid)][0]) for stage, models in enumerate(stages)]
    ends = list(itertools.accumulate(counts))
    described = []
    for stage, files in enumerate(grid):
        own = range(stage, len(stages), len(grid))
        layers = " and ".join(f"{ends[chunk] - counts[chunk]}-{ends[chunk] - 1}" for chunk in own)
        for rank, file in enumerate(files):
            size = sum(tensor.num_bytes for chunk in own for tensor in stages[chunk][rank].values())
            described.append((file.parent.name, f"layers {layers}, {size / 1e6:,.1f} MB"))
    return described


# Writing


def _without_rows(stored: StoredTensor, unused: int) -> StoredTensor:
    """The position table without its first `unused` rows; any other tensor as it is."""
    if stored.name != "embedding.position_embeddings.weight":
        return stored
    (rows, columns), dtype = stored.blocks[0].block, stored.dtype
    return StoredTensor.of_block(stored.name, POSITIONS, (slice(unused, rows.stop), columns), dtype)


def _wrap_model(
    config: OPTConfig, dtype: torch.dtype, options: ConversionOptions
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    rest = {"args": megatron_args(config, dtype, options), "checkpoint_version": 3.0, "iteration": 0}
    return lambda model: rest | {"model": model}
