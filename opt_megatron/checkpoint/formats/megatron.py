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

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...config import OPTConfig
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile
from ..parameter_mapping import canonical_shapes, stage_parameters
from ..storage.lazy_tensor import LazyTensor
from ..storage.torch_reader import TorchFile
from .format import OutputFormat
from .infer_config import directory_config, namespace_values
from .megatron_args import check_arguments, check_layout, megatron_args
from .megatron_ranks import RANK_FILE, TRACKER, iteration_directory, pipeline_stages, rank_directory, rank_files
from .megatron_stages import Stage, canonical_model, count_layers, local_name
from .megatron_tensors import stored_tensor
from .model_parallel_parts import check_no_duplicates


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
        check_arguments(arguments, path)
        check_layout(arguments, path, tp, pp)
        _check_no_duplicates(stages, path)
        config, tensors, notes = canonical_model(path, stages, grid, config, arguments)
        return Checkpoint(path, f"Megatron TP{tp} x PP{pp}", config, tensors, notes, _describe_ranks(grid, stages))

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
        for stage, layers in enumerate(pipeline_stages(config.num_layers, pp, first, last)):
            parameters = stage_parameters(config, layers, first=stage == 0, last=stage == pp - 1)
            for rank in range(tp):
                tensors = tuple(stored_tensor(p, shapes, config.head_dim, dtype_of, rank, tp) for p in parameters)
                path = Path("release") / rank_directory(rank, stage, pp) / RANK_FILE
                files.append(OutputFile(path, "torch", tensors, _wrap_model(config, tensors[0].dtype, tp, pp)))
        return files

    def text_files(self, checkpoint: Checkpoint, files: list[OutputFile]) -> dict[str, str]:
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
    return {local_name(name): tensor for name, tensor in stored if "_extra_state" not in name}


def _check_no_duplicates(stages: list[Stage], directory: Path) -> None:
    matrices = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj")
    names = [f"decoder.layers.0.{matrix}.weight" for matrix in matrices]
    ranks = [[model[name] for name in names if name in model] for models in stages for model in models]
    check_no_duplicates(ranks, f"{directory}: ranks")


def _describe_ranks(grid: list[list[Path]], stages: list[Stage]) -> list[tuple[str, str]]:
    described, first = [], 0
    for files, models in zip(grid, stages, strict=True):
        count = count_layers(models[0], files[0])
        for file, model in zip(files, models, strict=True):
            size = sum(tensor.num_bytes for tensor in model.values())
            described.append((file.parent.name, f"layers {first}-{first + count - 1}, {size / 1e6:,.1f} MB"))
        first += count
    return described


# Writing


def _wrap_model(config: OPTConfig, dtype: torch.dtype, tp: int, pp: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    rest = {"args": megatron_args(config, dtype, tp, pp), "checkpoint_version": 3.0, "iteration": 0}
    return lambda model: rest | {"model": model}
