"""opt-megatron verify: compares a checkpoint with its manifest, or with another checkpoint."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UserError, printable, shorten
from ..options import Options, option
from .arguments import ModelConfigOptions, config_argument, print_config_notes
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

HELP = "compare a converted checkpoint with its manifest, or two checkpoints of any formats tensor by tensor"
EXAMPLE = "opt-megatron verify checkpoints/opt-13b-tp2 opt-13b"


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """The checkpoints that are compared."""

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
    """Print every difference; exit with code 1 if there is one.

    Raises:
        UserError: a checkpoint cannot be read, or there is nothing to compare with.
    """
    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.locate import locate

    if args.logits and args.other is None:
        raise UserError("--logits compares two checkpoints; name a second one")
    first = open_checkpoint(locate(args.checkpoint), config_argument(args))
    second = open_checkpoint(locate(args.other), config_argument(args)) if args.other else None
    for checkpoint in (first, second):
        if checkpoint is not None:
            print_config_notes(checkpoint.config_notes, args)
    are_equal = _compare_weights(first, second, args.workers)
    if args.logits and second is not None:
        are_equal &= _compare_logits(first, second)
    if not are_equal:
        sys.exit(1)


def _compare_weights(first: Checkpoint, second: Checkpoint | None, workers: int) -> bool:
    """Print every difference and a verdict; returns whether there is no difference.

    Args:
        second: None compares with the manifest.
    """
    from ..checkpoint.compare import differences_between, differences_from_manifest
    from ..checkpoint.manifest import comparable_config, config_differences, read_manifest
    from ..files import progress_bar

    total = sum(tensor.num_bytes for tensor in first.tensors.values())
    with progress_bar("reading", unit="B", unit_scale=True, total=total) as bar:
        if second is None:
            found = differences_from_manifest(first, workers=workers, progress=bar.update)
        else:
            found = differences_between(first, second, workers=workers, progress=bar.update)
    theirs = read_manifest(first.path).config if second is None else comparable_config(second.config)
    configs = config_differences(comparable_config(first.config), theirs)
    for difference in found:
        print(printable(f"{shorten([difference.name])} {difference.what}"))
    for sentence in configs:
        print(printable(sentence))
    with_what = "its manifest" if second is None else f"{second.path} ({second.format_description})"
    verdict = f"differ in {len(found)} of" if found else "are equal to the bit in all"
    values = f"{len(configs)} value" + ("s" if len(configs) > 1 else "")
    config_values = f", {'and' if found else 'but differ in'} {values} of the config" if configs else ""
    names = first.tensors.keys() | {difference.name for difference in found}
    print(f"{first.path} ({first.format_description}) and {with_what} {verdict} {len(names)} tensors{config_values}")
    return not found and not configs


def _compare_logits(first: Checkpoint, second: Checkpoint) -> bool:
    """Print the largest difference of the logits of 64 fixed tokens, in float32; returns whether it is at most 1e-4."""
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
