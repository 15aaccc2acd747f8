"""Infers a config for files without a config.json, from the shapes of their tensors and other metadata in them.

Everything but the number of heads follows from the shapes. The heads are in metaseq's `cfg` and in Megatron's
`args`; for the released sizes they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import POSITION_OFFSET, RELEASED_SIZES, OPTConfig, dtype_name
from ...errors import CheckpointError
from ..parameter_mapping import EMBEDDING, PREFIX
from ..storage.lazy_tensor import LazyTensor

ACTIVATION_IS_ASSUMED = "the activation is assumed to be ReLU: nothing in the files says so, --activation relu does"


@dataclass
class StoredMetadata:
    """What files contain about the model besides its tensors; None where they contain nothing.

    Attributes:
        where: the place in the files, for messages ("cfg.model").
        states_activation: it says that the activation is ReLU; a format refuses files that say another one.
        notes: sentences for the user about what was found there.
    """

    where: str
    num_attention_heads: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    do_layer_norm_before: bool | None = None
    states_activation: bool = False
    notes: list[str] = field(default_factory=list)


def directory_config(path: Path) -> OPTConfig | None:
    """The config in a checkpoint's directory, or in that of its one file; None if there is no config.json.

    Raises:
        CheckpointError: the file is not the config of an OPT model.
    """
    file = (path.parent if path.is_file() else path) / "config.json"
    return OPTConfig.from_file(file) if file.is_file() else None


def infer_config(tensors: Mapping[str, LazyTensor], metadata: StoredMetadata) -> tuple[OPTConfig, list[str]]:
    """A config that fits canonical tensors, and sentences about what was inferred from what.

    Raises:
        CheckpointError: a tensor whose shape is needed is missing, or the number of heads is unknown.
    """
    rows, embed = _shape(tensors, "embed_tokens.weight")
    positions, hidden = _shape(tensors, "embed_positions.weight")
    ffn, _ = _shape(tensors, "layers.0.fc1.weight")
    numbers = [name.removeprefix(f"{PREFIX}layers.").split(".")[0] for name in tensors if f"{PREFIX}layers." in name]
    layers = 1 + max(int(number) for number in numbers if number.isdigit())
    final_norm = f"{PREFIX}final_layer_norm.weight" in tensors
    heads, source = _heads(layers, hidden, metadata)
    pre_norm = final_norm if metadata.do_layer_norm_before is None else metadata.do_layer_norm_before
    config = OPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        word_embed_proj_dim=embed,
        vocab_size=rows,
        max_position_embeddings=positions - POSITION_OFFSET,
        # If the files do not say: of the released models only 350m has no final norm, and it is post-norm.
        do_layer_norm_before=pre_norm,
        has_final_layer_norm=final_norm,
        dropout=_number(metadata.dropout, 0.1),
        attention_dropout=_number(metadata.attention_dropout, 0.0),
        dtype=dtype_name(tensors[EMBEDDING].dtype),
    )
    norm = "pre-norm" if pre_norm else "post-norm" + ("" if final_norm else ", since there is no final norm")
    return config, [
        f"sizes from the tensors' shapes: {layers} layers, hidden {hidden}, ffn {ffn}, vocabulary {rows}, "
        f"{positions - POSITION_OFFSET} positions, {norm}",
        f"{heads} attention heads from {source}",
        *([] if metadata.states_activation else [ACTIVATION_IS_ASSUMED]),
        *metadata.notes,
    ]


def namespace_values(namespace: Any) -> dict[str, Any]:
    """The values of an argparse.Namespace or a dictionary; empty for anything else."""
    if isinstance(namespace, Mapping):
        return dict(namespace)
    return dict(vars(namespace)) if type(namespace).__name__ == "Namespace" else {}


def integer(values: Mapping[str, Any], name: str) -> int | None:
    """The integer under a name of an untrusted dictionary; None if there is none or it is of another type."""
    value = values.get(name)
    return value if type(value) is int else None


def _heads(layers: int, hidden: int, metadata: StoredMetadata) -> tuple[int, str]:
    if metadata.num_attention_heads:
        return metadata.num_attention_heads, metadata.where
    for name, size in RELEASED_SIZES.items():
        if (size.config.num_layers, size.config.hidden_size) == (layers, hidden):
            return size.config.num_attention_heads, f"the table of released sizes ({name})"
    raise CheckpointError(
        f"nothing tells the number of attention heads of a model of {layers} layers and hidden size {hidden}: "
        "give its config.json with --config"
    )


def _shape(tensors: Mapping[str, LazyTensor], name: str) -> tuple[int, int]:
    tensor = tensors.get(PREFIX + name)
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"there is no config.json, and no matrix {name} to derive one from; give --config")
    return tensor.shape[0], tensor.shape[1]


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else default
