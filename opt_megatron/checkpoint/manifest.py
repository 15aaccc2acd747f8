"""The manifest: what a conversion read, how, and a hash of every canonical tensor that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..version import __version__
from .view import Checkpoint

MANIFEST = "opt_megatron_manifest.json"


def write_manifest(
    directory: Path, source: Checkpoint, options: dict[str, Any], dtypes: dict[str, str], hashes: dict[str, str]
) -> None:
    """Write it into a converted directory.

    The hashes are xxh3-128 of each canonical tensor's bytes (row by row, little-endian, in the dtype that
    was written), so they are the same for every format and layout.
    """
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": dtypes[name], "xxh3_128": hashes[name]}
        for name, tensor in source.tensors.items()
    }
    content = {
        "opt_megatron": __version__,
        "source": {"name": source.path.name, "format": source.format, "derived": source.derived},
        "options": options,
        "tensors": tensors,
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entry for every canonical tensor.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    try:
        tensors = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return {name: {key: entry[key] for key in ("shape", "dtype", "xxh3_128")} for name, entry in tensors.items()}
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory}: has no {MANIFEST}, as conversions write it; name a second checkpoint to compare with"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a manifest: {error!r}") from None
