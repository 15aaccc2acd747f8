"""Which rank's file is where in a Megatron directory, and which layers each pipeline stage holds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from ...errors import CheckpointError, UserError, shorten
from ...files import read_bounded
from .model_parallel_parts import missing_from_grid

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_ITERATION_DIRECTORY = re.compile(r"iter_(\d{7,})")
_RANK_DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")


def rank_directory(tp_rank: int, pp_rank: int, pipeline_stages: int) -> str:
    """Megatron-LM's name for one rank's directory."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pipeline_stages > 1 else "")


def iteration_name(iteration: int) -> str:
    """Megatron-LM's name for the directory of one iteration."""
    return f"iter_{iteration:07d}"


def iteration_directories(directory: Path) -> list[tuple[int, Path]]:
    """(iteration, directory) of every iteration in a run's directory, the latest first; empty if there is none."""
    if not directory.is_dir():
        return []
    matches = [(_ITERATION_DIRECTORY.fullmatch(child.name), child) for child in directory.iterdir()]
    return sorted(((int(match[1]), child) for match, child in matches if match), reverse=True)


def iteration_directory(directory: Path) -> Path:
    """The directory of the ranks' directories, which the tracker names.

    Raises:
        CheckpointError: the tracker is not as Megatron-LM writes it, or names what is not there.
    """
    word = read_bounded(directory / TRACKER, 1000).decode(errors="replace").strip()
    if word != "release" and not re.fullmatch(r"[0-9]{1,9}", word):
        raise CheckpointError(f"{directory / TRACKER}: says {word[:40]!r}, neither 'release' nor a number")
    path = directory / (word if word == "release" else iteration_name(int(word)))
    if not path.is_dir():
        raise CheckpointError(f"{directory}: {TRACKER} says {word!r}, but there is no directory {path.name}")
    return path


def find_iteration(path: Path, is_iteration: Callable[[Path], bool]) -> Path | None:
    """The directory itself, the one that its tracker names, or where none is named the newest, if `is_iteration`."""
    if is_iteration(path):
        return path
    iterations = [directory for _, directory in iteration_directories(path)]
    if (path / TRACKER).is_file():
        with contextlib.suppress(CheckpointError):  # what it names is gone
            iterations = [iteration_directory(path)]
    return next(filter(is_iteration, iterations), None)


def rank_files(directory: Path) -> list[list[Path]]:
    """[pipeline stage][tensor rank] -> file.

    Raises:
        CheckpointError: a rank is missing or there twice.
    """
    found: dict[tuple[int, int], Path] = {}
    for child in sorted(directory.iterdir()):
        match = _RANK_DIRECTORY.fullmatch(child.name)
        if match and (child / RANK_FILE).is_file():
            cell = int(match[2] or 0), int(match[1])
            if cell in found:
                raise CheckpointError(f"{directory}: {found[cell].parent.name} and {child.name} are the same rank")
            found[cell] = child / RANK_FILE
    if not found:
        raise CheckpointError(f"{directory}: holds no mp_rank_*/{RANK_FILE}")
    stages, ranks, missing = missing_from_grid(found)
    if missing:
        names = shorten([rank_directory(tp, pp, stages) for pp, tp in missing])
        raise CheckpointError(f"{directory}: {len(found)} rank files are there, missing are {names}")
    return [[found[pp, tp] for tp in range(ranks)] for pp in range(stages)]


def pipeline_stages(num_layers: int, stages: int, first: int | None = None, last: int | None = None) -> list[range]:
    """The layers of each pipeline stage.

    Args:
        first, last: number of layers in the first and in the last stage, if not as many as in the others.

    Raises:
        UserError: the layers cannot be divided so.
    """
    if stages == 1 and first is not None and last is not None and first != last:
        raise UserError(f"one pipeline stage cannot hold {first} layers as the first and {last} as the last")
    counts: list[int | None] = [None] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    given, others = sum(count or 0 for count in counts), counts.count(None)
    rest = num_layers - given
    is_even = rest == 0 if others == 0 else rest % others == 0 and rest >= others
    if not is_even or any(count is not None and count < 1 for count in counts):
        raise UserError(_cannot_divide(num_layers, stages, first, last))
    ranges, start = [], 0
    for count in counts:
        size = rest // others if count is None else count
        ranges.append(range(start, start + size))
        start += size
    return ranges


def _cannot_divide(num_layers: int, stages: int, first: int | None, last: int | None) -> str:
    return (
        f"{num_layers} layers cannot be divided into {stages} pipeline stages"
        + (f" with {first} in the first" if first is not None else "")
        + (f" and {last} in the last" if last is not None else "")
        + (
            "; all others hold equally many"
            if first or last
            else f": {num_layers} % {stages} = {num_layers % stages}; "
            "use --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers"
        )
    )
