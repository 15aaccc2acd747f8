"""opt-megatron inspect: prints what a checkpoint is, without reading its weights."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import printable
from ..options import Options, option
from .arguments import ModelConfigOptions, config_argument, print_config_notes
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from ..config import OPTConfig

HELP = "print a checkpoint's format, layout, config, dtype, parameter count and size per rank"
EXAMPLE = "opt-megatron inspect checkpoints/opt-13b-tp2"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """The checkpoint that is inspected."""

    checkpoint: str = option(help="a checkpoint in any format, or a name as --load takes it", positional=True)


OPTIONS: Groups = {"": (InspectOptions, ModelConfigOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Print what the files' headers say.

    Raises:
        UserError: there is no such checkpoint, or it is incomplete or damaged.
    """
    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.locate import locate
    from ..config import dtype_name

    checkpoint = open_checkpoint(locate(args.checkpoint), config_argument(args))
    print_config_notes(checkpoint.config_notes, args)
    dtypes = Counter(dtype_name(tensor.dtype) for tensor in checkpoint.tensors.values())
    for name, value in _facts(checkpoint, dtypes):
        print(printable(f"{name:12}{value}"))
    for name, what in checkpoint.ranks:
        print(f"{name:16}{what}")
    _print_size_per_rank(checkpoint.config, next(iter(dtypes)))


def _facts(checkpoint: Checkpoint, dtypes: Counter[str]) -> list[tuple[str, object]]:
    """What is printed of a checkpoint: name and value of each line."""
    from ..checkpoint.manifest import MANIFEST

    config = checkpoint.config
    elements = sum(tensor.num_elements for tensor in checkpoint.tensors.values())
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    norm = "pre-norm" if config.do_layer_norm_before else "post-norm"
    heads = f"{config.num_attention_heads} heads, ffn {config.ffn_hidden_size}"
    embedding = f", embedding {config.word_embed_proj_dim}" if config.has_embedding_projection else ""
    return [
        ("checkpoint", checkpoint.path),
        ("format", checkpoint.format_description),
        ("layers", f"{config.num_layers}, {norm}"),
        ("hidden", f"{config.hidden_size}, {heads}{embedding}"),
        ("vocabulary", f"{config.vocab_size} rows, {_num_tokens(checkpoint)} tokens"),
        ("positions", config.max_position_embeddings),
        ("dtype", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items())),
        ("parameters", f"{elements:,} in {len(checkpoint.tensors)} tensors, {total / 1e6:,.1f} MB"),
        ("manifest", "yes" if (checkpoint.path / MANIFEST).is_file() else "no"),
    ]


def _num_tokens(checkpoint: Checkpoint) -> int:
    """Rows that belong to a token of the tokenizer beside the weights, or by the config alone where there is none."""
    from ..tokenizer import OPTTokenizer, has_tokenizer

    config = checkpoint.config
    if not has_tokenizer(checkpoint.directory):
        return config.num_tokens
    return config.vocab_size - len(OPTTokenizer.from_directory(checkpoint.directory).unused_ids(config.vocab_size))


def _print_size_per_rank(config: OPTConfig, dtype: str) -> None:
    from ..checkpoint.memory_estimate import Workload, estimate_ranks
    from ..parallel.layout import tensor_parallel_sizes

    sizes = []
    for tp in [n for n in tensor_parallel_sizes(config) if n <= 16]:
        ranks = estimate_ranks(config, tp, 1, Workload(1, 1, dtype), dtype)
        sizes.append(f"{tp}: {ranks[0].weights / 1e6:,.1f} MB a rank")
    print(f"{'at TP':12}{', '.join(sizes)}")
