"""opt-megatron plan: what a model needs on a layout, before anything is downloaded or allocated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import size_in_bytes

if TYPE_CHECKING:
    from ..checkpoint.memory_estimate import RankMemory
    from ..config import OPTConfig

HELP = "print the memory that a model needs per rank on a layout, and which layouts fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--model", required=True, help="a released size (opt-125m ... opt-175b), or a config.json or its directory"
    )
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, metavar="T", help="default: 1, or with neither the smallest that fit"
    )
    parser.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        metavar="P",
        help="default: 1, or with neither the smallest that fit",
    )
    parser.add_argument("--dtype", default="float16", help="float32, float16 or bfloat16; default: float16")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows that run at the same time; default: 1")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a row; default: all of the model's positions"
    )
    parser.add_argument("--device-memory", default="80GB", metavar="SIZE", help="of one device; default: 80GB")


def run(args: argparse.Namespace) -> None:
    """Print the plan of a layout, or the smallest layouts that fit when no sizes are given.

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
    stored, memory = config.dtype, size_in_bytes(args.device_memory)
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
        return OPTConfig.from_file(path if path.is_file() else path / "config.json")
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
    header = (
        "rank",
        "stage",
        "layers",
        "heads",
        "vocabulary",
        "weights",
        "KV cache",
        "activations",
        "total",
        "from disk",
    )
    rows = [header]
    for number, rank in enumerate(ranks):
        vocabulary = _range(rank.vocabulary_rows) if rank.vocabulary_rows else "-"
        sizes = (rank.weights, rank.kv_cache, rank.activations, rank.total, rank.read_from_disk)
        rows.append(
            (str(number), str(rank.stage), _range(rank.layers), _range(rank.heads), vocabulary, *map(_gb, sizes))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    fullest = max(rank.total for rank in ranks)
    if fullest <= memory:
        print(f"fits: {_gb(fullest)} on the fullest rank, {_gb(memory)} a device")
    else:
        print(f"does not fit: {_gb(fullest)} on the fullest rank, but {_gb(memory)} a device")


def _range(numbers: range) -> str:
    return f"{numbers.start}-{numbers.stop - 1}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
