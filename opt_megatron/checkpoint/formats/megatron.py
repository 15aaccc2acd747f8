"""Reader of Megatron-LM's directory layout, at any TP x PP: this project's and plain GPT checkpoints of OPT.

    DIR/latest_checkpointed_iteration.txt       "release", or an iteration's number
    DIR/release/mp_rank_{tp:02d}/model_optim_rng.pt               without pipeline parallelism
    DIR/release/mp_rank_{tp:02d}_{pp:03d}/model_optim_rng.pt      with it
    DIR/config.json and the tokenizer's files                     this project's addition

A file holds {"args": Namespace, "checkpoint_version": 3.0, "iteration": int, "model": {name: tensor}}
(Megatron-LM, megatron/training/checkpointing.py). Plain Megatron-LM pads the vocabulary, may have left out
the position table's two unused rows, and names norms differently with TransformerEngine.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import LAYERNORM_EPSILON, POSITION_OFFSET, RELEASED_VOCAB_SIZE, OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..parameter_mapping import EMBEDDING, POSITIONS, Parameter, Split, component_view, stage_parameters
from ..storage.blocks import Block
from ..storage.lazy_tensor import Concatenated, LazyTensor, RemappedTensor, Replicated, RowRange, Tied, zero_rows
from ..storage.torch_reader import TorchFile
from .infer_config import StoredMetadata, config_beside, infer_config, integer, namespace_values
from .model_parallel_parts import check_no_duplicates, missing_from_grid

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_RANK_DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# TransformerEngine's fused modules hold the norm that stands before them.
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def is_megatron(directory: Path) -> bool:
    """Whether the directory holds Megatron-LM's tracker file."""
    return (directory / TRACKER).is_file()


def rank_directory(tp_rank: int, pp_rank: int, pipeline_stages: int) -> str:
    """Megatron-LM's name for one rank's directory."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pipeline_stages > 1 else "")


def open_megatron(directory: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a directory lazily, whatever layout it was written for, even pipeline stages or not.

    Args:
        config: instead of the directory's config.json; where both are missing, one is derived from the
            shapes and Megatron-LM's `args`.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or the ranks do not fit each other.
    """
    config = config or config_beside(directory)
    grid = _rank_files(_iteration_directory(directory))
    tp, pp = len(grid[0]), len(grid)
    opened = [[TorchFile(file) for file in row] for row in grid]
    stages = [[_model_of(mapped) for mapped in row] for row in opened]
    arguments = namespace_values(opened[0][0].content.get("args"))
    _check_arguments(arguments, directory, tp, pp)
    _check_not_doubled(stages, directory)
    counts = [_count_layers(row[0], grid[stage][0]) for stage, row in enumerate(stages)]
    if config is not None and sum(counts) != config.num_layers:
        raise CheckpointError(f"{directory}: the stages hold {sum(counts)} layers, the config says {config.num_layers}")
    tensors = _canonical(grid, stages, counts, _shape_of_model(stages, counts, arguments, config))
    derived: list[str] = []
    if config is None:
        config, derived = _derive(tensors, arguments)
    _fit_vocabulary_and_positions(tensors, config)
    ranks = _describe_ranks(grid, stages, counts)
    return Checkpoint(directory, f"Megatron TP{tp} x PP{pp}", config, tensors, derived, ranks)


def _check_arguments(arguments: dict[str, Any], directory: Path, tp: int, pp: int) -> None:
    """Refuse what Megatron-LM says of itself where it is not an OPT, or not all of it is here."""
    sizes = [integer(arguments, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline")]
    if None not in sizes and sizes != [tp, pp]:
        raise CheckpointError(
            f"{directory}: rank files of TP{tp} x PP{pp} are here, but args says TP{sizes[0]} x PP{sizes[1]}: "
            "some are missing, or of another checkpoint"
        )
    expected = {
        "swiglu": False,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": False,
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "layernorm_epsilon": LAYERNORM_EPSILON,
        "add_bias_linear": True,
    }
    for name, wanted in expected.items():
        value = arguments.get(name, wanted)
        if type(value) in (bool, str, float) and value != wanted:
            raise CheckpointError(f"{directory}: args says {name}={value!r:.40}; in OPT it is {wanted!r}")


def _check_not_doubled(stages: list[list[dict[str, LazyTensor]]], directory: Path) -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    slices = [model[name] for models in stages for model in models if name in model]
    check_no_duplicates(slices, f"{directory}: ranks")


def _describe_ranks(
    grid: list[list[Path]], stages: list[list[dict[str, LazyTensor]]], counts: list[int]
) -> list[tuple[str, str]]:
    described, first = [], 0
    for files, models, count in zip(grid, stages, counts, strict=True):
        for file, model in zip(files, models, strict=True):
            size = sum(source.num_bytes for source in model.values())
            described.append((file.parent.name, f"layers {first}-{first + count - 1}, {size / 1e6:,.1f} MB"))
        first += count
    return described


def _iteration_directory(directory: Path) -> Path:
    word = (directory / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if word != "release" and not re.fullmatch(r"[0-9]{1,9}", word):
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
            place = int(match[2] or 0), int(match[1])
            if place in found:
                raise CheckpointError(f"{directory}: {found[place].parent.name} and {child.name} are the same rank")
            found[place] = child / RANK_FILE
    if not found:
        raise CheckpointError(f"{directory}: holds no mp_rank_*/{RANK_FILE}")
    stages, ranks, missing = missing_from_grid(found)
    if missing:
        names = shorten([rank_directory(tp, pp, stages) for pp, tp in missing])
        raise CheckpointError(f"{directory}: {len(found)} rank files are there, missing are {names}")
    return [[found[pp, tp] for tp in range(ranks)] for pp in range(stages)]


def _model_of(mapped: TorchFile) -> dict[str, LazyTensor]:
    stored = mapped.model("Megatron").items()
    return {_local_name(name): source for name, source in stored if "_extra_state" not in name}


def _local_name(name: str) -> str:
    for theirs, ours in _TE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _count_layers(model: dict[str, LazyTensor], file: Path) -> int:
    numbers = {int(match[1]) for match in map(_LAYER.match, model) if match}
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"{file}: layers {sorted(numbers)} are not numbered 0 to {len(numbers) - 1}")
    return len(numbers)


def _shape_of_model(
    stages: list[list[dict[str, LazyTensor]]], counts: list[int], arguments: dict[str, Any], config: OPTConfig | None
) -> OPTConfig:
    """What decides which parameters there are: the config, or a stand-in for one that is derived later."""
    if config is not None:
        return config
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
    grid: list[list[Path]], stages: list[list[dict[str, LazyTensor]]], counts: list[int], config: OPTConfig
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
            for part, name in enumerate(parameter.canonical):
                source = _assembled(parameter, part, shards, config.head_dim)
                if name in tensors:  # the last stage's copy of the embedding
                    source = Tied(tensors[name], source, "the embeddings of the first and the last stage")
                tensors[name] = source
    return tensors


def _check_names(parameters: list[Parameter], models: list[dict[str, LazyTensor]], files: list[Path]) -> None:
    wanted = {parameter.megatron for parameter in parameters}
    for model, file in zip(models, files, strict=True):
        missing, unknown = sorted(wanted - model.keys()), sorted(model.keys() - wanted)
        if missing or unknown:
            raise CheckpointError(
                f"{file}: {len(missing)} tensors are missing ({shorten(missing)}) and "
                f"{len(unknown)} unknown ({shorten(unknown)})"
            )


def _assembled(parameter: Parameter, part: int, shards: list[LazyTensor], head_dim: int) -> LazyTensor:
    """One canonical tensor out of the tensor parallel ranks' shards."""
    parts = len(parameter.canonical)
    pieces = [shard if parts == 1 else interleaved_part(shard, part, parts, head_dim) for shard in shards]
    if parameter.split is Split.REPLICATED:
        return Replicated(pieces, parameter.megatron)
    return Concatenated(pieces, parameter.split.value)


def interleaved_part(shard: LazyTensor, part: int, parts: int, head_dim: int) -> LazyTensor:
    """Part number `part` of `parts` (q, k or v) of a tensor that holds them head by head."""
    if shard.shape[0] % (parts * head_dim):
        return shard  # left to check_tensors, which names the tensor: its rows cannot be whole heads
    return _InterleavedPart(shard, part, parts, head_dim)


class _InterleavedPart(RemappedTensor):
    """q, k or v out of `linear_qkv`, which holds them head by head."""

    def __init__(self, fused: LazyTensor, part: int, parts: int, head_dim: int) -> None:
        super().__init__(fused, (fused.shape[0] // parts, *fused.shape[1:]))
        self._part, self._parts, self._head_dim = part, parts, head_dim

    def _translate(self, block: Block) -> Block:
        first, stop = self._heads(block)
        per_head = self._parts * self._head_dim
        return (slice(first * per_head, stop * per_head), *block[1:])

    def _arrange(self, values: Tensor, block: Block) -> Tensor:
        flat = component_view(values, self._part, self._parts, self._head_dim).flatten(0, 1)
        skipped = block[0].start - self._heads(block)[0] * self._head_dim
        return flat[skipped : skipped + block[0].stop - block[0].start]

    def _heads(self, block: Block) -> tuple[int, int]:
        """The heads that hold the block's rows."""
        return block[0].start // self._head_dim, -(-block[0].stop // self._head_dim)


def _derive(tensors: dict[str, LazyTensor], arguments: dict[str, Any]) -> tuple[OPTConfig, list[str]]:
    hints = StoredMetadata("args", integer(arguments, "num_attention_heads"))
    hints.dropout, hints.attention_dropout = arguments.get("hidden_dropout"), arguments.get("attention_dropout")
    config, derived = infer_config(tensors, hints)
    positions = integer(arguments, "max_position_embeddings")
    if positions == tensors[POSITIONS].shape[0] and positions & (positions - 1) == 0:
        # 2048 rows for 2048 positions: a table without the two rows that OPT never uses.
        config = config.replace(max_position_embeddings=positions)
        derived.append(f"{positions} positions, since the table has no rows for OPT's offset; two of zeros are added")
    if RELEASED_VOCAB_SIZE < config.vocab_size < RELEASED_VOCAB_SIZE + 128 * 64:
        derived.append(f"vocabulary {RELEASED_VOCAB_SIZE}; {config.vocab_size - RELEASED_VOCAB_SIZE} rows are padding")
        config = config.replace(vocab_size=RELEASED_VOCAB_SIZE)
    return config, derived


def _fit_vocabulary_and_positions(tensors: dict[str, LazyTensor], config: OPTConfig) -> None:
    embedding, positions = tensors[EMBEDDING], tensors[POSITIONS]
    if embedding.shape[0] > config.vocab_size:  # padded to a multiple of 128 x TP
        tensors[EMBEDDING] = RowRange(embedding, 0, config.vocab_size)
    if positions.shape[0] == config.max_position_embeddings:
        tensors[POSITIONS] = Concatenated([zero_rows(POSITION_OFFSET, positions), positions], 0)


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
        "layernorm_epsilon": LAYERNORM_EPSILON,
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
