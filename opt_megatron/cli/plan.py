"""opt-megatron plan: prints the memory that a model needs on a layout; nothing is downloaded or allocated."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..options import Options, Size, option
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..checkpoint.memory_estimate import RankMemory
    from ..config import OPTConfig

HELP = "print the memory that a model needs per rank on a layout, and which layouts fit"
EXAMPLE = "opt-megatron plan --model opt-66b --device-memory 80GB"
_COLUMNS: tuple[str, ...] = (
    "rank", "stage", "layers", "heads", "vocabulary", "weights", "KV cache", "activations", "total", "from disk",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """The model, layout and workload whose memory is estimated."""

    model: str = option(
        help="a released size (opt-125m ... opt-175b), or a config.json or its directory", required=True, is_path=True
    )
    tensor_model_parallel_size: int | None = option(
        None, help="ranks that share each layer", metavar="T", default_text="1, or with neither the smallest that fit"
    )
    pipeline_model_parallel_size: int | None = option(
        None,
        help="stages, each with a part of the layers",
        metavar="P",
        default_text="1, or with neither the smallest that fit",
    )
    dtype: str = option("float16", help="float32, float16 or bfloat16")
    batch: int = option(1, help="sequences that run at the same time")
    context: int | None = option(None, help="tokens of a sequence", default_text="all of the model's positions")
    device_memory: Size = option("80GB", help="memory of one device", metavar="SIZE")


OPTIONS: Groups = {"": (PlanOptions,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS)


def run(args: argparse.Namespace) -> None:
    """Print the memory of each rank of a layout, or the smallest layouts that fit if no sizes are given.

    Raises:
        UserError: the model does not divide by the sizes, or a number is out of its range.
    """
    from ..checkpoint.memory_estimate import Workload, estimate_ranks, smallest_layouts
    from ..config import check_dtype
    from ..parallel.layout import check_model_divides

    check_dtype(args.dtype)
    config = _config(args.model)
    workload = Workload(
        args.batch, config.max_position_embeddings if args.context is None else args.context, args.dtype
    )
    stored, memory = config.dtype, args.device_memory
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    header = f"{config.name or args.model}: {config.num_parameters:,} parameters, {args.dtype}, "
    header += f"batch {workload.batch}, context {workload.context}"
    if tp is None and pp is None:
        _print_layouts(header, smallest_layouts(config, workload, stored, memory), memory)
        return
    tp, pp = (1 if size is None else size for size in (tp, pp))
    check_model_divides(config, tp, pp)
    _print_ranks(header, estimate_ranks(config, tp, pp, workload, stored), memory)


def _config(name: str) -> OPTConfig:
    from ..checkpoint.locate import EMBEDDED_DIRECTORY, EMBEDDED_NAME
    from ..config import OPTConfig, released_config, released_name

    path = EMBEDDED_DIRECTORY if name == EMBEDDED_NAME else Path(name)
    if path.exists():
        return OPTConfig.from_path(path)
    if released_name(name) is None and "/" in name:
        raise UserError(f"{name}: there is no such file, and it is no released size")
    return released_config(name)


def _print_layouts(title: str, layouts: list[tuple[int, int, int]], memory: int) -> None:
    if not layouts:
        raise UserError(f"no layout of up to 128 ranks fits {_gb(memory)} a device; give more --device-memory")
    print(title)
    print(f"the smallest layouts that fit {_gb(memory)} a device:")
    for tp, pp, fullest in layouts:
        print(f"  TP{tp} x PP{pp}  {tp * pp} ranks, {_gb(fullest)} on the fullest")


def _print_ranks(title: str, ranks: list[RankMemory], memory: int) -> None:
    print(title)
    rows = [_COLUMNS, *(_row(number, rank) for number, rank in enumerate(ranks))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    fullest = max(rank.total for rank in ranks)
    if fullest <= memory:
        print(f"fits: {_gb(fullest)} on the fullest rank, {_gb(memory)} a device")
    else:
        print(f"does not fit: {_gb(fullest)} on the fullest rank, but {_gb(memory)} a device")


def _row(number: int, rank: RankMemory) -> tuple[str, ...]:
    vocabulary = _range(rank.vocabulary_rows) if rank.vocabulary_rows else "-"
    sizes = (rank.weights, rank.kv_cache, rank.activations, rank.total, rank.read_from_disk)
    return str(number), str(rank.stage), _range(rank.layers), _range(rank.heads), vocabulary, *map(_gb, sizes)


def _range(numbers: range) -> str:
    return f"{numbers.start}-{numbers.stop - 1}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
