"""metaseq's files: raw FSDP shards, model-parallel parts flat and unflattened, and singletons.

    checkpoint_last-model_part-{p}-shard{s}.pt      part p, FSDP shard s of it
    reshard-model_part-{p}.pt                       a part, flat (with shard_metadata) or unflattened
    checkpoint_1_4000.pt-model_part-{p}.pt          the same, as OPT-IML is released
    restored.pt, reshard.pt                         the whole model, with qkv fused or separate

    gpt2-vocab.json, gpt2-merges.txt, dict.txt      the tokenizer

A part's fused attention input is [K; V; Q]. Written are unflattened parts, or the one file of a post-norm model
as Meta released 350m. (Format: facebookresearch/metaseq, metaseq/scripts.)
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from ...config import OPTConfig
from ...errors import CheckpointError, UserError, shorten
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile, SourceBlock, StoredTensor
from ..parameter_mapping import EMBEDDING, PREFIX, canonical_shapes, rank_block, split_of
from ..storage.blocks import Block, block_shape
from ..storage.lazy_tensor import LazyTensor, RowRange, Tied
from ..storage.torch_reader import TorchFile
from .format import OutputFormat
from .infer_config import StoredMetadata, directory_config, infer_config, integer, namespace_values
from .metaseq_content import COMPANIONS, VERSION, wrap_part, write_companions
from .metaseq_fsdp import FLAT_PARAMETER, read_part
from .model_parallel_parts import join_parts, missing_from_grid

_PART_OR_SHARD = re.compile(r"(?P<stem>.+?)(?:\.pt)?(?:-(?:model_)?part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
# metaseq's names of modules whose canonical names differ; it also fuses k, v and q into qkv_proj.
_CANONICAL_NAMES = {"layer_norm": "final_layer_norm", "project_in_dim": "project_in", "project_out_dim": "project_out"}
_METASEQ_NAMES = {canonical: metaseq for metaseq, canonical in _CANONICAL_NAMES.items()}


class MetaseqFormat(OutputFormat):
    """Meta's own training and release format."""

    title = "metaseq"
    detection_rank = 50  # last: any .pt file may be metaseq's
    file_names = "|".join([r"(checkpoint|reshard|restored|consolidated)[^/]*\.pt", *map(re.escape, COMPANIONS)])
    model_file_suffixes = (".pt",)

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds .pt files."""
        return any(directory.glob("*.pt"))

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily, or one file that is a whole model.

        Args:
            config: by default that of a config.json, or one inferred from the shapes and metaseq's `cfg`.

        Raises:
            CheckpointError: a part or shard is missing or there twice, the files are of several models, or a
                group of parameters is flat and has no metadata.
        """
        grid = _part_grid(path)
        opened = [[TorchFile(file) for file in shards] for shards in grid]
        first = opened[0][0]
        parts = [_canonical(read_part(shards)) for shards in opened]
        metadata = _stored_metadata(first.content)
        tensors = join_parts(parts, path)
        _check_part_count(first.content, tensors, len(grid), path)
        notes: list[str] = []
        config = config or directory_config(path)  # as this project's conversions write it
        if config is None:
            config, notes = infer_config(tensors, metadata)
        embedding = tensors.get(EMBEDDING)
        if embedding is not None and embedding.shape[0] == _padded_vocab_size(config, len(grid)):
            tensors[EMBEDDING] = RowRange(embedding, 0, config.vocab_size)
        return Checkpoint(path, _describe(grid, first), config, tensors, notes)

    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """Unflattened parts with the fused [K; V; Q]; 350m as the one file that Meta released.

        Raises:
            UserError: 350m in several parts, for which metaseq has no format.
        """
        config, parts = checkpoint.config, options.tensor_model_parallel_size
        is_fused = config.do_layer_norm_before and not config.has_embedding_projection
        if not is_fused and parts > 1:
            raise UserError(f"metaseq has post-norm OPT as one file only; ask for 1 part instead of {parts}")
        return [
            OutputFile(
                Path(f"reshard-model_part-{part}.pt" if is_fused else "reshard.pt"),
                "torch",
                tuple(_part_tensors(config, dtype_of, part, parts, fused=is_fused)),
                wrap_part(config, dtype_of(EMBEDDING), parts, fused=is_fused),
            )
            for part in range(parts)
        ]

    def write_companions(self, directory: Path, config: OPTConfig, options: ConversionOptions) -> list[str]:
        """Write the tokenizer under metaseq's names."""
        return write_companions(directory, _padded_vocab_size(config, options.tensor_model_parallel_size))


FORMAT = MetaseqFormat()


# Reading


def _part_grid(path: Path) -> list[list[Path]]:
    """[part][shard] -> file, none missing and none there twice."""
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    found: dict[tuple[int, int], Path] = {}
    stems = set()
    for file in files:
        match = _PART_OR_SHARD.fullmatch(file.name)
        if match is None:
            raise CheckpointError(f"{file}: is not named as metaseq's files are")
        stems.add(match["stem"])
        cell = int(match["part"] or 0), int(match["shard"] or 0)
        if cell in found and len(stems) == 1:
            raise CheckpointError(f"{path}: {found[cell].name} and {file.name} are the same part and shard")
        found[cell] = file
    if len(stems) > 1:
        names = shorten([file.name for file in files])
        raise CheckpointError(f"{path}: holds files of {len(stems)} checkpoints ({names}); leave those of one")
    if path.is_file():  # whether it is one part of several is checked later, from its shapes
        return [list(found.values())]
    parts, shards, missing = missing_from_grid(found)
    if missing:
        names = shorten([f"part {p} shard {s}" for p, s in missing])
        raise CheckpointError(
            f"{path}: {len(found)} files make up to {parts} parts x {shards} shards, "
            f"but {parts * shards - len(found)} are missing: {names}"
        )
    return [[found[p, s] for s in range(shards)] for p in range(parts)]


def _canonical(part: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A part's tensors under canonical names, with the fused [K; V; Q] separated."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in part.items():
        short = name.removeprefix("decoder.")
        module, _, kind = short.rpartition(".")
        if module.endswith("self_attn.qkv_proj") and tensor.shape and tensor.shape[0] % 3 == 0:
            third = tensor.shape[0] // 3
            for number, letter in enumerate("kvq"):
                renamed = f"{PREFIX}{module.removesuffix('qkv_proj')}{letter}_proj.{kind}"
                tensors[renamed] = RowRange(tensor, number * third, (number + 1) * third)
        else:
            tensors[f"{PREFIX}{_CANONICAL_NAMES.get(module, module)}.{kind}"] = tensor
    head = tensors.pop(f"{PREFIX}output_projection.weight", None)  # tied, and usually not stored
    if head is not None:
        embedding = tensors.get(EMBEDDING)
        tensors[EMBEDDING] = head if embedding is None else Tied(embedding, head, "embed_tokens and output_projection")
    return tensors


def _arguments(content: Any) -> dict[str, Any]:
    cfg = content.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else None
    return namespace_values(model) or namespace_values(content.get("args"))


def _stored_metadata(content: Any) -> StoredMetadata:
    values = _arguments(content)
    metadata = StoredMetadata("cfg.model", integer(values, "decoder_attention_heads"))
    metadata.dropout, metadata.attention_dropout = values.get("dropout"), values.get("attention_dropout")
    before = values.get("decoder_normalize_before")
    metadata.do_layer_norm_before = before if type(before) is bool else None
    activation = values.get("activation_fn", "relu")
    if type(activation) is str and activation != "relu":
        raise CheckpointError(f"cfg.model says activation_fn {activation[:20]!r}; OPT's is 'relu'")
    metadata.states_activation = bool(values)  # where it does not name one, metaseq's models have ReLU
    separator = integer(values, "self_attn_doc_sep")
    if separator is not None and separator >= 0:
        metadata.notes.append(
            f"self_attn_doc_sep is {separator}: the model was trained with positions restarting and attention cut "
            f"after every token {separator}, which generation here does not do within a prompt"
        )
    return metadata


def _check_part_count(content: Any, tensors: dict[str, LazyTensor], parts: int, path: Path) -> None:
    # A merged model may still carry the number of parts that it was trained in, so the shapes decide.
    projection = tensors.get(f"{PREFIX}layers.0.self_attn.out_proj.weight")
    if projection is not None and projection.shape[0] != projection.shape[-1]:
        stated = integer(_arguments(content), "model_parallel_size")
        raise CheckpointError(
            f"{path}: {parts} of {stated or 'several'} parts are here: they hold {projection.shape[-1]} of the "
            f"{projection.shape[0]} columns of the attention output; fetch the others"
        )


def _describe(grid: list[list[Path]], first: TorchFile) -> str:
    flat = any(str(name).endswith(FLAT_PARAMETER) for name in first.content["model"])
    if len(grid[0]) > 1:
        return f"metaseq FSDP shards, {len(grid)} parts x {len(grid[0])} shards"
    if len(grid) == 1 and not flat:
        return "metaseq singleton"
    return f"metaseq {'flat' if flat else 'unflattened'} parts, {len(grid)}"


# Writing


def _part_tensors(config: OPTConfig, dtype_of: DtypeOf, part: int, parts: int, *, fused: bool) -> list[StoredTensor]:
    # Older loaders dropped the final norm of files without a version.
    stored = [StoredTensor(VERSION, (1,), torch.float32, (), torch.tensor([3.0]))]
    for name, shape in canonical_shapes(config).items():
        module, _, kind = name.removeprefix(PREFIX).rpartition(".")
        if name == EMBEDDING:
            stored.append(_embedding(config, dtype_of(name), part, parts))
            continue
        block = rank_block(shape, split_of(name), part, parts)
        if fused and module.endswith("q_proj"):
            stored.append(_fused_qkv(module.removesuffix("q_proj"), kind, block, dtype_of(name)))
        elif not fused or not module.endswith(("k_proj", "v_proj")):
            stored_name = f"decoder.{_METASEQ_NAMES.get(module, module)}.{kind}"
            stored.append(StoredTensor.of_block(stored_name, name, block, dtype_of(name)))
    return stored


def _padded_vocab_size(config: OPTConfig, parts: int) -> int:
    """metaseq pads its dictionary to a multiple of 8 and expects as many rows, equally many in each part."""
    multiple = math.lcm(8, parts)
    return -(-config.vocab_size // multiple) * multiple


def _embedding(config: OPTConfig, dtype: torch.dtype, part: int, parts: int) -> StoredTensor:
    rows, (total, width) = _padded_vocab_size(config, parts) // parts, canonical_shapes(config)[EMBEDDING]
    block = (slice(min(part * rows, total), min((part + 1) * rows, total)), slice(0, width))
    return StoredTensor.of_block("decoder.embed_tokens.weight", EMBEDDING, block, dtype).with_rows(rows)


def _fused_qkv(attention: str, kind: str, block: Block, dtype: torch.dtype) -> StoredTensor:
    """This part's rows of k, v and q, one below the other: [K; V; Q]."""
    rows, *columns = block_shape(block)
    size = torch.Size((rows, *columns)).numel()
    blocks = tuple(
        SourceBlock(f"{PREFIX}{attention}{letter}_proj.{kind}", block, number * size)
        for number, letter in enumerate("kvq")
    )
    return StoredTensor(f"decoder.{attention}qkv_proj.{kind}", (3 * rows, *columns), dtype, blocks)
