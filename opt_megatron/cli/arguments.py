"""Arguments that several subcommands share, under Megatron-LM's names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..option_kinds import size_in_bytes as size_in_bytes

if TYPE_CHECKING:
    from ..config import OPTConfig


def add_load(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--load and --revision."""
    parser.add_argument(
        "--load",
        required=required,
        metavar="CHECKPOINT",
        help="a checkpoint in any format (Hugging Face, Megatron, metaseq, FlagAI, a training run), a name "
        "(opt-125m ... story) or a Hub repository (owner/name)"
        + ("" if required else "; default: the embedded toy model, story"),
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def add_json_lines(parser: argparse.ArgumentParser) -> None:
    """--input, --json-key and --strict of commands that read texts."""
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="JSON lines, one object a line; also .gz"
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="the text's key in each object; default: text"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad line; default: skip and report them"
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Tensor and pipeline parallel sizes."""
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="default: 1")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="P", help="default: 1")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Where and how a model runs."""
    add_layout(parser)
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, float16, bfloat16 or auto (float32 on a CPU, the checkpoint's on a GPU); default: auto",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=1234, help="default: 1234")


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a config.json (or its directory) instead of what the checkpoint says of itself",
    )


def config_argument(args: argparse.Namespace) -> OPTConfig | None:
    """The config that --config names, or None."""
    if args.config is None:
        return None
    from ..config import OPTConfig

    path = Path(args.config).expanduser()
    return OPTConfig.from_file(path if path.is_file() else path / "config.json")


def say_derived(notes: list[str]) -> None:
    """Tell what of the config was derived because the files do not carry it."""
    for note in notes:
        print(f"opt-megatron: no config.json: {note}", file=sys.stderr)
