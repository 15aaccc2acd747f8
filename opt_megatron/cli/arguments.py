"""Arguments that several subcommands share, under Megatron-LM's names."""

from __future__ import annotations

import argparse


def add_load(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--load and --revision."""
    parser.add_argument(
        "--load",
        required=required,
        metavar="CHECKPOINT",
        help="a checkpoint directory (Hugging Face or Megatron), a name (opt-125m ... opt-66b, story) "
        "or a Hub repository (owner/name)" + ("" if required else "; default: the embedded toy model, story"),
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


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
