"""Which checkpoints a run has saved, and which are intact: every file is there with the manifest's size and hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import xxhash

from ...checkpoint.formats.megatron_ranks import iteration_directories
from ...files import read_text
from ...parallel.agreement import check_same_on_all_ranks
from ...parallel.context import ParallelContext

MANIFEST_FILE = "manifest.json"
_READ_BYTES = 2**22


def saved_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, newest first: (iteration, directory)."""
    return iteration_directories(directory)  # what is being written has another name


def newest_intact_checkpoint(
    directory: Path, parallel: ParallelContext, print_line: Callable[[str], None] = lambda text: None
) -> Path | None:
    """The newest checkpoint whose files all agree with its manifest, or None. Collective: the ranks share the hashing.

    Args:
        print_line: called with a line for each newer checkpoint that is damaged.

    Raises:
        UserError: on every rank; the ranks see different checkpoints under its name.
    """
    for _, path in parallel.broadcast_object(saved_checkpoints(directory)):
        problems = parallel.gather_objects(find_damage(path, parallel.rank, parallel.world_size))
        problem = next((text for text in problems if text), None)
        if problem is None:
            seen = {f"{path.name}/{MANIFEST_FILE}": manifest_entry(path / MANIFEST_FILE)[1]}
            check_same_on_all_ranks(parallel.control_group, seen, str(path))
            return path
        print_line(f"{path} is passed over: {problem}")
    return None


def find_damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, among this rank's share of them; None if nothing is."""
    try:
        manifest = json.loads(read_text(path / MANIFEST_FILE))
        for name, (size, digest) in sorted(manifest.items())[rank::ranks]:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
            if manifest_entry(file)[1] != digest:
                return f"{name} is damaged (its hash differs)"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({error})"
    return None


def manifest_entry(path: Path) -> tuple[int, str]:
    """Size and 128-bit xxh3 hash of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return path.stat().st_size, digest.hexdigest()
