"""Reader of Hugging Face directories: safetensors or .bin, one file or shards with an index.

Names come with the prefix `model.decoder.`, `decoder.` or none; the tied tensor under `embed_tokens`, under
`lm_head`, or under both.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..parameter_mapping import EMBEDDING, PREFIX
from ..storage.lazy_tensor import LazyTensor, Tied
from ..storage.mmap import map_safetensors
from ..storage.torch_reader import FileTensor, TorchFile
from .infer_config import StoredMetadata, config_beside, infer_config

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def is_huggingface(directory: Path) -> bool:
    """Whether the directory holds weights under one of Hugging Face's file names."""
    return any((directory / name).is_file() for name in SINGLE_FILES + INDEX_FILES)


def open_huggingface(path: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a directory lazily, or one weight file. Safetensors are preferred where both kinds are there.

    Args:
        config: instead of the directory's; where both are missing, one is derived from the shapes.

    Raises:
        CheckpointError: a shard is missing or damaged, or a name stands for two tensors.
    """
    directory, files = (path.parent, [path]) if path.is_file() else (path, weight_files(path))
    stored: dict[str, LazyTensor] = {}
    for file in files:
        sources = map_safetensors(file) if file.suffix == ".safetensors" else pickled_tensors(file)
        twice = sorted(sources.keys() & stored.keys())
        if twice:
            raise CheckpointError(f"{file}: {shorten(twice)} stands in another shard too")
        stored |= sources
    kind = "safetensors" if files[0].suffix == ".safetensors" else "pytorch .bin"
    shards = f", {len(files)} shards" if len(files) > 1 else ""
    tensors = canonical_names(directory, stored)
    derived: list[str] = []
    config = config or config_beside(directory)
    if config is None:
        config, derived = infer_config(tensors, StoredMetadata("nowhere"))
    return Checkpoint(path, f"Hugging Face {kind}{shards}", config, tensors, derived)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, from the index where there is one.

    Raises:
        CheckpointError: the index cannot be read, or names files that are not there.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (directory / single).is_file():  # before an index, as transformers chooses
            return [directory / single]
        if (directory / index).is_file():
            return _indexed_files(directory / index)
    raise CheckpointError(f"{directory}: there is none of {', '.join(SINGLE_FILES + INDEX_FILES)}")


def _indexed_files(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: is not an index of shards ({error!r})") from None
    strange = [repr(name) for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise CheckpointError(f"{index}: names files outside its directory: {shorten(strange)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of the {len(names)} shards in {index.name} are missing: "
            f"{shorten(missing)}; fetch them"
        )
    return [index.parent / name for name in names]


def pickled_tensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin file by name, those under FlagAI's 'module' where it has one."""
    mapped = TorchFile(file)
    state = mapped.content
    if isinstance(state, dict) and isinstance(state.get("module"), dict):
        state = state["module"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    return {name: mapped.source(tensor) for name, tensor in state.items() if isinstance(tensor, FileTensor)}


def canonical_names(directory: Path, stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Hugging Face's names in any of their forms to canonical ones; the tied tensor becomes one.

    Raises:
        CheckpointError: a name stands for two tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    head = None
    for name, source in stored.items():
        if name.removeprefix("model.") == "lm_head.weight":
            head = source
            continue
        short = name.removeprefix("model.").removeprefix("decoder.")
        if PREFIX + short in tensors:
            raise CheckpointError(f"{directory}: {short} is stored twice under different prefixes")
        tensors[PREFIX + short] = source
    if head is not None:
        embedding = tensors.get(EMBEDDING)
        tensors[EMBEDDING] = (
            head if embedding is None else Tied(embedding, head, f"{directory}: embed_tokens.weight and lm_head.weight")
        )
    return tensors
