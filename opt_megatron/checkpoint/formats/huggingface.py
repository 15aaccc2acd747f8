"""Hugging Face directories: safetensors or .bin, one file or shards with an index.

    config.json, model.safetensors                      or pytorch_model.bin
    config.json, model-00001-of-00002.safetensors ...   and model.safetensors.index.json (the same with .bin)

Names have the prefix `model.decoder.`, `decoder.` or none; the tied tensor is stored as `embed_tokens`, as
`lm_head`, or as both. Written are safetensors with the prefix `model.decoder.` and without `lm_head`.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ...files import read_text
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile, StoredTensor
from ..parameter_mapping import EMBEDDING, PREFIX, canonical_shapes
from ..storage.blocks import whole
from ..storage.lazy_tensor import LazyTensor, Tied
from ..storage.tensor_file import open_safetensors
from ..storage.torch_reader import TorchFile
from .format import OutputFormat
from .infer_config import StoredMetadata, directory_config, infer_config

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class HuggingFaceFormat(OutputFormat):
    """Whole tensors under Hugging Face's names, which are the canonical ones."""

    title = "Hugging Face"
    detection_rank = 40
    file_names = r"model[^/]*\.safetensors|[^/]*\.index\.json|pytorch_model[^/]*\.bin"
    model_file_suffixes = (".safetensors", ".bin")
    has_tensor_parts = False

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds weights, or an index of them, under one of Hugging Face's file names."""
        return any((directory / name).is_file() for name in SINGLE_FILES + INDEX_FILES)

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily, or one weight file. Safetensors are preferred to .bin where there are both.

        Args:
            config: instead of the directory's; where there is neither, one is inferred from the shapes.

        Raises:
            CheckpointError: a shard is missing or damaged, or two tensors have one name.
        """
        directory, files = (path.parent, [path]) if path.is_file() else (path, _weight_files(path))
        stored: dict[str, LazyTensor] = {}
        for file in files:
            tensors = open_safetensors(file) if file.suffix == ".safetensors" else pickled_tensors(file)
            twice = sorted(tensors.keys() & stored.keys())
            if twice:
                raise CheckpointError(f"{file}: {shorten(twice)} is in another shard too")
            stored |= tensors
        kind = "safetensors" if files[0].suffix == ".safetensors" else "pytorch .bin"
        shards = f", {len(files)} shards" if len(files) > 1 else ""
        canonical = canonical_names(directory, stored)
        notes: list[str] = []
        config = config or directory_config(directory)
        if config is None:
            config, notes = infer_config(canonical, StoredMetadata("nowhere"))
        return Checkpoint(path, f"Hugging Face {kind}{shards}", config, canonical, notes)

    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """Safetensors as transformers writes them: one file, or shards of at most `options.max_shard_size`."""
        tensors = [
            StoredTensor.of_block(name, name, whole(shape), dtype_of(name))
            for name, shape in canonical_shapes(checkpoint.config).items()
        ]
        return safetensors_files(tensors, options.max_shard_size)

    def text_files(self, checkpoint: Checkpoint, files: list[OutputFile]) -> dict[str, str]:
        """The index, if there are several shards."""
        if len(files) == 1:
            return {}
        weight_map = {stored.name: file.path.name for file in files for stored in file.tensors}
        index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
        return {INDEX_FILES[0]: json.dumps(index, indent=2) + "\n"}


FORMAT = HuggingFaceFormat()


def safetensors_files(tensors: list[StoredTensor], max_bytes: int) -> list[OutputFile]:
    """One file of all tensors, or shards of at most `max_bytes` each."""
    shards = _shards(tensors, max_bytes)
    if len(shards) == 1:
        return [OutputFile(Path(SINGLE_FILES[0]), "safetensors", tuple(tensors))]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return [OutputFile(Path(n), "safetensors", tuple(shard)) for n, shard in zip(names, shards, strict=True)]


def _shards(tensors: list[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    """The tensors in their order, in groups of at most `max_bytes` (or of one tensor that is larger)."""
    shards: list[list[StoredTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if tensor.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, from the index where there is one.

    Raises:
        CheckpointError: the index cannot be read, or names files that are not there.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (directory / single).is_file():  # before an index, as transformers chooses
            return [directory / single]
        if (directory / index).is_file():
            return indexed_files(directory / index)
    raise CheckpointError(f"{directory}: there is none of {', '.join(SINGLE_FILES + INDEX_FILES)}")


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, beside it.

    Raises:
        CheckpointError: it cannot be read, or names files that are not there.
    """
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
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


def pickled_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin file by name; those under FlagAI's "module" if it has that key."""
    file = TorchFile(path)
    state = file.content
    if isinstance(state, dict) and isinstance(state.get("module"), dict):
        state = state["module"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    return file.tensors(state)


def canonical_names(directory: Path, stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Replace each form of Hugging Face's names by the canonical one, and join the tied tensor.

    Raises:
        CheckpointError: two tensors have one name.
    """
    tensors: dict[str, LazyTensor] = {}
    head = None
    for name, tensor in stored.items():
        if name.removeprefix("model.") == "lm_head.weight":
            head = tensor
            continue
        short = name.removeprefix("model.").removeprefix("decoder.")
        if PREFIX + short in tensors:
            raise CheckpointError(f"{directory}: {short} is stored twice under different prefixes")
        tensors[PREFIX + short] = tensor
    if head is not None:
        embedding = tensors.get(EMBEDDING)
        tensors[EMBEDDING] = (
            head if embedding is None else Tied(embedding, head, f"{directory}: embed_tokens.weight and lm_head.weight")
        )
    return tensors
