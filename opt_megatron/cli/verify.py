"""opt-megatron verify: a checkpoint against its manifest, or against another one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError, shorten
from ..options import Options, option
from .arguments import ModelConfigOptions, config_argument
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

HELP = "compare a converted checkpoint with its manifest, or two checkpoints of any formats tensor by tensor"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """What is compared."""

    checkpoint: str = option(
        help="a checkpoint in any format, or a name as --load takes it", positional=True, metavar="A"
    )
    other: str | None = option(
        None, help="another; without it, A is compared with its manifest", positional=True, nargs="?", metavar="B"
    )
    logits: bool = option(False, help="compare the logits of a forward pass as well (needs B)")
    workers: int = option(2, help="threads that read", minimum=1)


OPTIONS: Groups = {"": (VerifyOptions, ModelConfigOptions)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Name every difference; end with exit code 1 if there is one.

    Raises:
        UserError: a checkpoint cannot be read, or there is nothing to compare with.
    """
    from ..checkpoint.compare import differences_between, differences_from_manifest
    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.locate import locate
    from ..checkpoint.manifest import comparable_config, config_differences, read_manifest
    from ..files import progress_bar

    if args.logits and args.other is None:
        raise UserError("--logits compares two checkpoints; name a second one")
    first = open_checkpoint(locate(args.checkpoint), config_argument(args))
    second = open_checkpoint(locate(args.other), config_argument(args)) if args.other else None
    total = sum(source.num_bytes for source in first.tensors.values())
    with progress_bar("reading", unit="B", unit_scale=True, total=total) as bar:
        options = {"workers": args.workers, "progress": bar.update}
        found = differences_between(first, second, **options) if second else differences_from_manifest(first, **options)
    theirs = comparable_config(second.config) if second else read_manifest(first.path).config
    configs = config_differences(comparable_config(first.config), theirs)
    for difference in found:
        print(f"{shorten([difference.name])} {difference.what}")
    for sentence in configs:
        print(sentence)
    with_what = f"{second.path} ({second.format_description})" if second else "its manifest"
    verdict = f"differ in {len(found)} of" if found else "are equal to the bit in all"
    values = f"{len(configs)} value" + ("s" if len(configs) > 1 else "")
    beside = f", {'and' if found else 'but differ in'} {values} of the config" if configs else ""
    names = first.tensors.keys() | {difference.name for difference in found}
    print(f"{first.path} ({first.format_description}) and {with_what} {verdict} {len(names)} tensors{beside}")
    failed = bool(found or configs)
    if args.logits:
        failed |= not _compare_logits(first, second)
    if failed:
        sys.exit(1)


def _compare_logits(first: Checkpoint, second: Checkpoint) -> bool:
    """Print how far the logits of both are apart, in float32 on 64 fixed tokens; whether they agree to 1e-4."""
    import torch

    from ..checkpoint.load import load_model
    from ..parallel.context import init_parallel

    parallel = init_parallel(device="cpu")
    length = min(64, first.config.max_position_embeddings, second.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    rows = min(first.config.num_tokens, second.config.num_tokens)
    tokens = torch.randint(rows, (1, length), generator=generator)
    with torch.no_grad():
        logits = [load_model(checkpoint, None, parallel, "float32")(tokens) for checkpoint in (first, second)]
    if logits[0].shape != logits[1].shape:
        print(f"logits have {logits[0].shape[-1]} and {logits[1].shape[-1]} columns")
        return False
    gap = float((logits[0] - logits[1]).abs().max())
    print(
        f"logits over {length} tokens differ by at most {gap:.3g}" if gap else f"logits over {length} tokens are equal"
    )
    return gap <= 1e-4
