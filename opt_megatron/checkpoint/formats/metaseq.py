"""Reader of metaseq's files: raw FSDP shards, model-parallel parts flat and unflattened, and singletons.

    checkpoint_last-model_part-{p}-shard{s}.pt      part p, FSDP piece s of it
    reshard-model_part-{p}.pt                       a part, flat (with shard_metadata) or unflattened
    checkpoint_1_4000.pt-model_part-{p}.pt          the same, as OPT-IML is released
    restored.pt, reshard.pt                         the whole model, with qkv fused or separate

A part's fused attention input is [K; V; Q]. (Format: facebookresearch/metaseq, metaseq/scripts.)
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..parameter_mapping import EMBEDDING, METASEQ_NAMES, PREFIX
from ..storage.lazy_tensor import LazyTensor, RowRange, Tied, split_flat_vector
from ..storage.torch_reader import TorchFile
from .infer_config import StoredMetadata, config_beside, infer_config, integer, namespace_values
from .model_parallel_parts import join_parts, missing_from_grid

_PART_OR_SHARD = re.compile(r"(?P<stem>.+?)(?:\.pt)?(?:-(?:model_)?part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
_FLAT = "flat_param_0"


def is_metaseq(directory: Path) -> bool:
    """Whether the directory holds .pt files (other formats are recognised before this one)."""
    return any(directory.glob("*.pt"))


def open_metaseq(path: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a directory, or one file that is a whole model, lazily.

    Args:
        config: what the model is; by default it is derived from the shapes and metaseq's `cfg`.

    Raises:
        CheckpointError: a part or shard is missing or doubled, the files are of several models, or a group
            of parameters is flat and nothing says what is in it.
    """
    grid = _grid(path)
    opened = [[TorchFile(file) for file in row] for row in grid]
    parts = [_canonical(_part(files, opened_files)) for files, opened_files in zip(grid, opened, strict=True)]
    hints = _hints(opened[0][0].content)
    tensors = join_parts(parts, path)
    _check_part_count(opened[0][0].content, tensors, len(parts), path)
    derived: list[str] = []
    config = config or config_beside(path)  # as this project's conversions write it
    if config is None:
        config, derived = infer_config(tensors, hints)
    return Checkpoint(path, _describe(grid, opened[0][0]), config, tensors, derived)


def _grid(path: Path) -> list[list[Path]]:
    """[part][shard] -> file, none missing and none doubled."""
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    found: dict[tuple[int, int], Path] = {}
    stems = set()
    for file in files:
        match = _PART_OR_SHARD.fullmatch(file.name)
        if match is None:
            raise CheckpointError(f"{file}: is not named as metaseq's files are")
        stems.add(match["stem"])
        place = int(match["part"] or 0), int(match["shard"] or 0)
        if place in found and len(stems) == 1:
            raise CheckpointError(f"{path}: {found[place].name} and {file.name} are the same part and shard")
        found[place] = file
    if len(stems) > 1:
        names = shorten([file.name for file in files])
        raise CheckpointError(f"{path}: holds files of {len(stems)} checkpoints ({names}); leave those of one")
    if path.is_file():  # one part of several is found incomplete by its cfg
        return [list(found.values())]
    parts, shards, missing = missing_from_grid(found)
    if missing:
        names = shorten([f"part {p} shard {s}" for p, s in missing])
        raise CheckpointError(
            f"{path}: {len(found)} files make up to {parts} parts x {shards} shards, "
            f"but {parts * shards - len(found)} are missing: {names}"
        )
    return [[found[p, s] for s in range(shards)] for p in range(parts)]


def _part(files: list[Path], opened: list[TorchFile]) -> dict[str, LazyTensor]:
    """One part's tensors under metaseq's names."""
    models = [_model(mapped) for mapped in opened]
    is_flat = [name.endswith(_FLAT) for name in models[0]]
    if not any(is_flat):
        if len(files) > 1:
            raise CheckpointError(f"{files[0]}: is one of {len(files)} shards, but its tensors are not flat")
        return models[0]
    return _unflattened(files, opened, models)


def _model(mapped: TorchFile) -> dict[str, LazyTensor]:
    return {name: source for name, source in mapped.model("metaseq").items() if name != "decoder.version"}


def _unflattened(
    files: list[Path], opened: list[TorchFile], models: list[dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    groups = [_groups(file, mapped) for file, mapped in zip(files, opened, strict=True)]
    tensors: dict[str, LazyTensor] = {}
    for path, (shapes, _) in groups[0].items():
        key = f"{path}.{_FLAT}" if path else _FLAT
        pieces = []
        for file, model, group in zip(files, models, groups, strict=True):
            if key not in model or path not in group:
                raise CheckpointError(f"{file}: has no {key}, which the first shard has")
            pieces.append(RowRange(model[key], 0, model[key].shape[0] - group[path][1]))
        have, want = sum(p.shape[0] for p in pieces), sum(map(math.prod, shapes.values()))
        if have != want:
            raise CheckpointError(
                f"{files[0].parent}: the {len(files)} shards that are here hold {have:,} of the {want:,} elements "
                f"of {key}; shards are missing or of another checkpoint"
            )
        prefix = f"{path}." if path else ""
        tensors |= split_flat_vector(
            pieces, {prefix + name.removeprefix(prefix): shape for name, shape in shapes.items()}
        )
    return tensors | {name: source for name, source in models[0].items() if not name.endswith(_FLAT)}


def _groups(file: Path, mapped: TorchFile) -> dict[str, tuple[dict[str, tuple[int, ...]], int]]:
    """FSDP path -> (names and shapes in order, padding of this shard)."""
    try:
        entries = mapped.content["shard_metadata"]["param_metadata"]
        groups = {}
        for entry in entries:
            flat = entry["params"][_FLAT]
            shapes = {name: tuple(shape) for name, shape in zip(flat["names"], flat["shapes"], strict=True)}
            padding = flat["padding"]
            numbers = [padding, *(size for shape in shapes.values() for size in shape)]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise TypeError("sizes that are not numbers")
            groups[str(entry["fsdp_path"])] = shapes, padding
        return groups
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: holds flat parameters, and its shard_metadata does not say what is in them "
            f"({type(error).__name__})"
        ) from None


def _canonical(part: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """metaseq's names to canonical ones, with the fused [K; V; Q] taken apart."""
    tensors: dict[str, LazyTensor] = {}
    for name, source in part.items():
        short = name.removeprefix("decoder.")
        module, _, kind = short.rpartition(".")
        if module.endswith("self_attn.qkv_proj") and source.shape and source.shape[0] % 3 == 0:
            third = source.shape[0] // 3
            for number, letter in enumerate("kvq"):
                renamed = f"{PREFIX}{module.removesuffix('qkv_proj')}{letter}_proj.{kind}"
                tensors[renamed] = RowRange(source, number * third, (number + 1) * third)
        else:
            tensors[f"{PREFIX}{METASEQ_NAMES.get(module, module)}.{kind}"] = source
    head = tensors.pop(f"{PREFIX}output_projection.weight", None)  # tied, and usually not stored
    if head is not None:
        embedding = tensors.get(EMBEDDING)
        tensors[EMBEDDING] = head if embedding is None else Tied(embedding, head, "embed_tokens and output_projection")
    return tensors


def _arguments(content: Any) -> dict[str, Any]:
    cfg = content.get("cfg")
    model = cfg.get("model") if isinstance(cfg, dict) else None
    return namespace_values(model) or namespace_values(content.get("args"))


def _hints(content: Any) -> StoredMetadata:
    values = _arguments(content)
    hints = StoredMetadata("cfg.model", integer(values, "decoder_attention_heads"))
    hints.dropout, hints.attention_dropout = values.get("dropout"), values.get("attention_dropout")
    before = values.get("decoder_normalize_before")
    hints.do_layer_norm_before = before if type(before) is bool else None
    activation = values.get("activation_fn", "relu")
    if type(activation) is str and activation != "relu":
        raise CheckpointError(f"cfg.model says activation_fn {activation[:20]!r}; OPT's is 'relu'")
    separator = integer(values, "self_attn_doc_sep")
    if separator is not None and separator >= 0:
        hints.notes.append(
            f"self_attn_doc_sep is {separator}: the model was trained with positions restarting and attention cut "
            f"after every token {separator}, which generation here does not do within a prompt"
        )
    return hints


def _check_part_count(content: Any, tensors: dict[str, LazyTensor], parts: int, path: Path) -> None:
    # A whole model may still carry the number of parts that it was trained in, so its shapes decide.
    projection = tensors.get(f"{PREFIX}layers.0.self_attn.out_proj.weight")
    if projection is not None and projection.shape[0] != projection.shape[-1]:
        stated = integer(_arguments(content), "model_parallel_size")
        raise CheckpointError(
            f"{path}: {parts} of {stated or 'several'} parts are here: they hold {projection.shape[-1]} of the "
            f"{projection.shape[0]} columns of the attention output; fetch the others"
        )


def _describe(grid: list[list[Path]], first: TorchFile) -> str:
    flat = any(str(name).endswith(_FLAT) for name in first.content["model"])
    if len(grid[0]) > 1:
        return f"metaseq FSDP shards, {len(grid)} parts x {len(grid[0])} shards"
    if len(grid) == 1 and not flat:
        return "metaseq singleton"
    return f"metaseq {'flat' if flat else 'unflattened'} parts, {len(grid)}"
