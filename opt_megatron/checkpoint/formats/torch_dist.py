"""Reader of what training saves: megatron-core's dist_checkpointing (torch_dist), with an index beside it.

    DIR/iter_0000200/  config.json  tensors.json  __0_0.distcp ...     (DIR itself stands for its newest)

A .distcp file is a row of torch.save files, one for each shard of a tensor. Where they are stands in `.metadata`,
a pickle of torch's own classes; what writes these directories also writes `tensors.json`, so that nothing has to be
unpickled to read them:

    {"decoder.layers.mlp.linear_fc1.weight": {"shape": [L, 4h, h], "dtype": "float32", "chunks":
        [{"offsets": [0, 0, 0], "sizes": [1, 2h, h], "file": "__0_0.distcp", "start": 0, "length": 9041}, ...]}}

All layers are one tensor, as core saves them. LoRA's factors (`lora_a`, `lora_b`, and lora.json) are added to their
weights as they are read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import DTYPES, OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..parameter_mapping import stage_parameters
from ..storage.blocks import Block
from ..storage.lazy_tensor import Concatenated, LazyTensor
from ..storage.mmap import MappedFile
from ..storage.torch_reader import FileSpan, FileTensor, TorchFile
from .infer_config import config_beside
from .megatron import interleaved_part

INDEX_FILE = "tensors.json"
LORA_FILE = "lora.json"
_ITERATION = re.compile(r"iter_(\d{7,})")
_LAYERS = "decoder.layers."


def is_torch_dist(directory: Path) -> bool:
    """Whether the directory is a training run's, or one of its checkpoints."""
    return _newest(directory) is not None


def _newest(directory: Path) -> Path | None:
    if (directory / INDEX_FILE).is_file():
        return directory
    found = [
        (int(match[1]), child)
        for child in directory.iterdir()
        if (match := _ITERATION.fullmatch(child.name)) and (child / INDEX_FILE).is_file()
    ]
    return max(found)[1] if found else None


def open_torch_dist(directory: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a checkpoint, or the newest of a run, lazily.

    Raises:
        CheckpointError: the index or a file is missing or damaged.
    """
    path = _newest(directory)
    config = config or config_beside(path)
    if config is None:
        raise CheckpointError(f"{path}: there is no config.json; put the model's there")
    stored = _Stored(path, _read_index(path / INDEX_FILE))
    scale = _lora_scale(path) if (path / LORA_FILE).is_file() else None
    tensors: dict[str, LazyTensor] = {}
    for row in stage_parameters(config, range(config.num_layers), first=True, last=True):
        source = stored.source(row.megatron)
        if source is None:
            continue  # named by Checkpoint.check_tensors
        if scale is not None:
            source = _with_factors(source, row.megatron, stored, scale)
        for part, name in enumerate(row.canonical):
            parts = len(row.canonical)
            tensors[name] = source if parts == 1 else interleaved_part(source, part, parts, config.head_dim)
    kind = f"training checkpoint {path.name}" + (" with LoRA" if scale is not None else "")
    return Checkpoint(path, kind, config, tensors)


class _Stored:
    """The tensors of one directory under core's names."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self._path, self._index = path, index
        self._files: dict[str, MappedFile] = {}

    def source(self, name: str) -> LazyTensor | None:
        """A parameter under Megatron's name, `decoder.layers.3.…` being a part of `decoder.layers.…`."""
        layer = None
        if name.startswith(_LAYERS):
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            name, layer = _LAYERS + rest, int(number)
        entry = self._index.get(name)
        if entry is None:
            return None
        try:
            return self._assemble(entry, layer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{self._path / INDEX_FILE}: {name} makes no sense: {error!r}") from None

    def _assemble(self, entry: dict[str, Any], layer: int | None) -> LazyTensor:
        shape, dtype = [int(size) for size in entry["shape"]], str(entry["dtype"])
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype[:20]!r}")
        chunks = entry["chunks"]
        skip = 0 if layer is None else 1
        if skip:
            chunks = [chunk for chunk in chunks if chunk["offsets"][0] == layer]
        placed = {}
        for chunk in chunks:
            offsets, sizes = tuple(chunk["offsets"][skip:]), tuple(chunk["sizes"][skip:])
            placed[offsets] = _Shard(self._part(chunk), sizes, getattr(torch, dtype), skip)
        dims = [dim for dim in range(len(shape) - skip) if len({offsets[dim] for offsets in placed}) > 1]
        if not placed or len(dims) > 1:
            raise ValueError("its shards are missing or do not lie along one dimension")
        pieces = [placed[offsets] for offsets in sorted(placed)]
        source = pieces[0] if len(pieces) == 1 else Concatenated(pieces, dims[0])
        if list(source.shape) != shape[skip:]:
            raise ValueError(f"its shards make up {list(source.shape)} of {shape[skip:]}")
        return source

    def _part(self, chunk: dict[str, Any]) -> FileSpan:
        name, start, length = chunk["file"], int(chunk["start"]), int(chunk["length"])
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError("a file outside the directory")
        if name not in self._files:
            if not (self._path / name).is_file():
                raise CheckpointError(f"{self._path}: {shorten([name])} is missing")
            self._files[name] = MappedFile(self._path / name)
        file = self._files[name]
        if start < 0 or length < 0 or start + length > file.size:
            raise CheckpointError(
                f"{self._path / name}: is damaged or incomplete: it has {file.size:,} bytes, "
                f"and bytes {start:,} to {start + length:,} are wanted"
            )
        return FileSpan(file, start, length)


class _Shard(LazyTensor):
    """A part of a file that holds one tensor; opened when it is first read.

    Args:
        skip: leading dimensions of size 1 that the stored tensor has and this one has not.
    """

    def __init__(self, part: FileSpan, shape: tuple[int, ...], dtype: torch.dtype, skip: int) -> None:
        super().__init__(shape, dtype)
        self._part, self._skip = part, skip
        self._opened: FileTensor | None = None

    def read(self, block: Block) -> Tensor:
        """Rows that are wanted are read, or copied where the file does not have them at a multiple of their size."""
        stored = self._tensor()
        row = math.prod(self.shape[1:])
        first = stored.offset + block[0].start * row
        values = stored.storage.values(first, first + (block[0].stop - block[0].start) * row)
        return values.view(block[0].stop - block[0].start, *self.shape[1:])[(slice(None), *block[1:])]

    def release(self, block: Block) -> None:
        """The pages under the rows (of a copy there are none)."""
        self._part.file.release(self.read(block))

    def _tensor(self) -> FileTensor:
        if self._opened is None:
            path = self._part.file.path
            content = TorchFile(path, self._part).content
            expected = (1,) * self._skip + self.shape
            if not isinstance(content, FileTensor) or content.shape != expected:
                raise CheckpointError(
                    f"{path}: holds something else than a tensor of {list(expected)} where one is wanted"
                )
            if content.stride[self._skip :] != _strides(self.shape) or content.storage.dtype != self.dtype:
                raise CheckpointError(f"{path}: a tensor of {list(expected)} does not lie there as its index says")
            self._opened = content
        return self._opened


class _Adapted(LazyTensor):
    """weight + scale B A, computed for the blocks that are read."""

    def __init__(self, weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> None:
        super().__init__(weight.shape, weight.dtype)
        self._weight, self._a, self._b, self._scale = weight, a, b, scale
        if (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"LoRA's factors of {list(a.shape)} and {list(b.shape)} do not fit a weight of {list(weight.shape)}"
            )

    def read(self, block: Block) -> Tensor:
        """In float32, then in the weight's dtype."""
        a = self._a.read((slice(0, self._a.shape[0]), block[1])).float()
        b = self._b.read((block[0], slice(0, self._b.shape[1]))).float()
        weight = self._weight.read(block)
        return (weight.float() + self._scale * (b @ a)).to(weight.dtype)

    def release(self, block: Block) -> None:
        """The weight's pages; the factors are small."""
        self._weight.release(block)


def _with_factors(source: LazyTensor, name: str, stored: _Stored, scale: float) -> LazyTensor:
    module, _, kind = name.rpartition(".")
    factors = [stored.source(f"{module}.{factor}") for factor in ("lora_a", "lora_b")] if kind == "weight" else [None]
    return source if None in factors else _Adapted(source, *factors, scale)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(index, dict):
        raise CheckpointError(f"{path}: holds a {type(index).__name__}, not an object")
    return index


def _lora_scale(path: Path) -> float:
    try:
        values = json.loads((path / LORA_FILE).read_text(encoding="utf-8"))
        scale = float(values["alpha"]) / int(values["rank"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise CheckpointError(f"{path / LORA_FILE}: does not say alpha and rank: {error!r}") from None
    if not math.isfinite(scale):
        raise CheckpointError(f"{path / LORA_FILE}: alpha / rank is {scale}")
    return scale
