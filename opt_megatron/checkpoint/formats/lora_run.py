"""LoRA's factors in the checkpoints of a training run: beside the weights, as `lora_a` and `lora_b` of a layer.

lora.json says what they are:

    {"base_model": "facebook/opt-125m",
     "layers": {"decoder.layers.0.self_attention.linear_qkv": {"scale": 2.0, "ranks": [8]}, ...}}

`ranks` has three numbers where q, k and v have an A each (`model/lora.py`). Files that say "rank", "alpha" and
"target_modules" instead are of earlier versions.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ...files import read_text
from ...model.lora_options import LoRALayer, LoRALayers, LoRAOptions
from ..adapter import Adapter
from ..parameter_mapping import ParameterMapping, stage_parameters
from ..storage.lazy_tensor import ColumnRange, LazyTensor, RowRange
from ..storage.lora_weight import LoRAFactors
from .megatron_tensors import qkv_component

LORA_FILE = "lora.json"


def lora_file_text(layers: LoRALayers, base_model: str | None) -> str:
    """The content of lora.json."""
    content = {"base_model": base_model, "layers": {name: asdict(layer) for name, layer in layers.items()}}
    return json.dumps(content, indent=1) + "\n"


def run_adapter(path: Path, config: OPTConfig, stored: dict[str, LazyTensor]) -> Adapter:
    """The factors of a checkpoint with a lora.json.

    Args:
        stored: the factors by Megatron's names.

    Raises:
        CheckpointError: lora.json is damaged, or does not describe what is stored.
    """
    stored = dict(stored)
    base_model, layers = read_lora_layers(path / LORA_FILE, config)
    factors: dict[str, LoRAFactors] = {}
    for parameter in stage_parameters(config, range(config.num_layers), first=True, last=True):
        module, _, kind = parameter.megatron.rpartition(".")
        layer = layers.get(module)
        if layer is None or kind != "weight":
            continue
        a, b = stored.pop(f"{module}.lora_a", None), stored.pop(f"{module}.lora_b", None)
        if a is None or b is None or len(a.shape) != 2 or a.shape[0] != layer.rank or b.shape[1:] != (layer.rank,):
            raise CheckpointError(f"{path}: the factors of {module} are missing, or not as {LORA_FILE} says")
        factors |= _canonical_factors(parameter, layer, a, b, config.head_dim)
    if stored:
        raise CheckpointError(f"{path}: {LORA_FILE} does not describe {shorten(list(stored), 3)}")
    return Adapter(path, factors, base_model)


def _canonical_factors(
    parameter: ParameterMapping, layer: LoRALayer, a: LazyTensor, b: LazyTensor, head_dim: int
) -> dict[str, LoRAFactors]:
    """The factors of each canonical weight that a layer consists of."""
    count, ends = len(parameter.canonical), list(accumulate(layer.ranks))
    ranges = [(end - rank, end) for end, rank in zip(ends, layer.ranks, strict=True)]
    if len(ranges) == 1:
        ranges *= count  # all parts share A
    factors = {}
    for index, (name, (start, stop)) in enumerate(zip(parameter.canonical, ranges, strict=True)):
        if start < stop:
            rows = b if count == 1 else qkv_component(b, index, count, head_dim)
            factors[name] = LoRAFactors(RowRange(a, start, stop), ColumnRange(rows, start, stop), layer.scale)
    return factors


def read_lora_layers(path: Path, config: OPTConfig) -> tuple[str | None, LoRALayers]:
    """The base model's name and the layers.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        values = json.loads(read_text(path))
        if "rank" in values:
            options = LoRAOptions(values["rank"], values["alpha"], tuple(values["target_modules"]))
            layers = options.layers(config.num_layers)
        else:
            layers = {name: _layer(**layer) for name, layer in values["layers"].items()}
        base_model = values.get("base_model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not say what LoRA adapts: {error!r}") from None
    return base_model if isinstance(base_model, str) else None, layers


def _layer(scale: float, ranks: list[Any]) -> LoRALayer:
    if not math.isfinite(scale) or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise ValueError(f"scale {scale}, ranks {str(ranks)[:40]}")
    return LoRALayer(float(scale), tuple(ranks))
