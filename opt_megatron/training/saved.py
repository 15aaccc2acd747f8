"""Which checkpoints a run has saved, and which are whole: every file there, with the manifest's size and hash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import xxhash

from ..parallel.context import ParallelContext

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"iter_(\d{7,})")
_CHUNK = 2**22


def saved_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, newest first: (iteration, directory)."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def newest_whole(
    directory: Path, parallel: ParallelContext, say: Callable[[str], None] = lambda text: None
) -> Path | None:
    """The newest checkpoint whose files are all there and have the manifest's hashes; None if there is none.

    Ranks share the hashing. `say` is told of every one that is passed over.
    """
    for _, path in parallel.broadcast_object(saved_checkpoints(directory)):
        problems = parallel.gather_objects(damage(path, parallel.rank, parallel.world_size))
        problem = next((text for text in problems if text), None)
        if problem is None:
            return path
        say(f"{path} is passed over: {problem}")
    return None


def damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, as far as this rank's share of them tells; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, (size, digest) in sorted(manifest.items())[rank::ranks]:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
            if file_entry(file)[1] != digest:
                return f"{name} is damaged (its hash differs)"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({error})"
    return None


def file_entry(path: Path) -> tuple[int, str]:
    """A manifest's entry: size and 128-bit xxh3 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()
