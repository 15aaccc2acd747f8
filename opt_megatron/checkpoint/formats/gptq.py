"""GPTQ's published layout, as AutoGPTQ and GPTQModel write it: Hugging Face's files with packed integers.

    config.json, quantize_config.json, model.safetensors     (or shards with an index, or another .safetensors)

Of each linear in a decoder layer there are qweight, qzeros, scales and g_idx instead of weight
(`storage/quantized_tensor.py`). The zeros of `checkpoint_format` "gptq" are stored less one, those of "gptq_v2" as they
are. The matrices are read as float32, the product of a scale and an integer; linear methods of 4 bits take integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ...files import read_text
from ..checkpoint import Checkpoint
from ..storage.lazy_tensor import LazyTensor
from ..storage.quantized_tensor import QuantizedTensor
from ..storage.tensor_file import open_safetensors
from .format import Format
from .huggingface import INDEX_FILES, canonical_names, indexed_files
from .infer_config import directory_config

QUANTIZE_CONFIG = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format
BITS = (2, 3, 4, 8)


class GPTQFormat(Format):
    """Hugging Face's files with quantised linears."""

    title = "GPTQ"
    detection_rank = 35
    file_names = r"model[^/]*\.safetensors(\.index\.json)?|quantize_config\.json"

    def detect(self, directory: Path) -> bool:
        """Whether the directory has a quantize_config.json."""
        return (directory / QUANTIZE_CONFIG).is_file()

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily.

        Raises:
            CheckpointError: it is not of GPTQ's method, or files are missing or damaged.
        """
        settings = _settings(path / QUANTIZE_CONFIG)
        stored: dict[str, LazyTensor] = {}
        for file in _weight_files(path):
            stored |= open_safetensors(file, integers=True)
        tensors = _with_matrices(path, canonical_names(path, stored), settings)
        config = config or directory_config(path)
        if config is None:
            raise CheckpointError(f"{path}: there is no config.json; put the model's there")
        return Checkpoint(path, f"GPTQ, {settings['bits']} bits", config, tensors)


FORMAT = GPTQFormat()


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(read_text(file))
        bits, layout = settings["bits"], settings.get("checkpoint_format", "gptq")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read as GPTQ's settings: {type(error).__name__}") from None
    method = settings.get("quant_method", "gptq")
    if method != "gptq" or bits not in BITS or layout not in ZERO_OFFSETS:
        raise CheckpointError(
            f"{file}: has {method}, {bits} bits, {layout}; only gptq with {', '.join(map(str, BITS))} bits and the "
            f"layouts {', '.join(ZERO_OFFSETS)} can be read"
        )
    return {"bits": bits, "zero_offset": ZERO_OFFSETS[layout]}


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILES[0]
    files = indexed_files(index) if index.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: has no .safetensors")
    return files


def _with_matrices(
    directory: Path, stored: Mapping[str, LazyTensor], settings: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """The tensors with each linear's four in one, under its weight's name."""
    tensors: dict[str, LazyTensor] = {}
    modules = sorted({name.rpartition(".")[0] for name in stored if name.endswith(".qweight")})
    for name, tensor in stored.items():
        if name.rpartition(".")[2] not in PARTS:
            tensors[name] = tensor
    for module in modules:
        missing = [part for part in PARTS if f"{module}.{part}" not in stored]
        if missing:
            raise CheckpointError(f"{directory}: {module} has no {shorten(missing)}")
        qweight, qzeros, scales, g_idx = (stored[f"{module}.{part}"] for part in PARTS)
        try:
            matrix = QuantizedTensor(qweight, qzeros, scales, g_idx, settings["bits"], settings["zero_offset"])
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {module}: {error}") from None
        tensors[f"{module}.weight"] = matrix
    return tensors
