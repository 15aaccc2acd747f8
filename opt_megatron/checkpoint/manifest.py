"""The manifest of a conversion: its source, its options, and a hash of every canonical tensor that it wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import OPTConfig
from ..errors import CheckpointError
from ..files import read_text
from ..version import __version__
from .checkpoint import Checkpoint

MANIFEST = "opt_megatron_manifest.json"


def write_manifest(
    directory: Path,
    source: Checkpoint,
    config: OPTConfig,
    options: dict[str, Any],
    dtypes: dict[str, str],
    hashes: dict[str, str],
) -> None:
    """Write the manifest into a converted directory.

    The hashes are xxh3-128 of each canonical tensor's bytes (row by row, little-endian, in the dtype that
    was written), so they are the same for every format and layout.

    Args:
        config: as in the directory's config.json.
        dtypes, hashes: of each canonical tensor as it was written.
    """
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": dtypes[name], "xxh3_128": hashes[name]}
        for name, tensor in source.tensors.items()
    }
    content = {
        "opt_megatron": __version__,
        "source": {"name": source.path.name, "format": source.format_description, "derived": source.config_notes},
        "options": options,
        "config": comparable_config(config),
        "tensors": tensors,
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Manifest:
    """A manifest's content: the config's fields, and shape, dtype and hash of every canonical tensor."""

    config: dict[str, Any]
    tensors: dict[str, dict[str, Any]]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a converted directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {MANIFEST}, as conversions write it; name a second checkpoint to compare with"
        )
    try:
        content = json.loads(read_text(path))
        keys = ("shape", "dtype", "xxh3_128")
        tensors = {name: {key: entry[key] for key in keys} for name, entry in content["tensors"].items()}
        return Manifest(dict(content["config"]), tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as a manifest: {type(error).__name__}") from None


def config_differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """A sentence for each field that is not the same in two configs, as `comparable_config` returns them."""
    names = [name for name in left if left[name] != right.get(name)]
    return [f"config: {name} is {left[name]} in the first and {right.get(name)} in the second" for name in names]


def comparable_config(config: OPTConfig) -> dict[str, Any]:
    """A config's fields without its name and its dtype; each tensor has its own dtype."""
    return {name: value for name, value in asdict(config).items() if name not in ("name", "dtype")}
