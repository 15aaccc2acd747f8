"""Which files training reads, under the names of Megatron-LM's arguments."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options, option


@dataclass(frozen=True)
class DataOptions(Options):
    """An indexed corpus, as `preprocess` writes it. Several are mixed by their weights or numbers of tokens."""

    data_path: tuple[str, ...] | None = option(
        None, help="prefixes, or weight prefix weight prefix ...", nargs="+", metavar="PREFIX", is_path=True
    )
    split: str = option("969,30,1", help="shares of the documents for training, validation, test")
    train_data_path: tuple[str, ...] | None = option(
        None, help="instead of --data-path and --split", nargs="+", metavar="PREFIX", is_path=True
    )
    valid_data_path: tuple[str, ...] | None = option(
        None, help="the same for validation", nargs="+", metavar="PREFIX", is_path=True
    )
    data_cache_path: str | None = option(
        None,
        help="directory of the shuffled indices",
        metavar="DIR",
        default_text="PREFIX/cache beside the first corpus, or a temporary one where that cannot be written",
        is_path=True,
    )


@dataclass(frozen=True)
class SupervisedOptions(Options):
    """JSON lines with `src` and `tgt` (or `text`) instead of an indexed corpus."""

    train: tuple[str, ...] = option(
        help="JSON lines with src and tgt, or text",
        argument="supervised_data",
        nargs="+",
        metavar="FILE",
        is_path=True,
    )
    valid: tuple[str, ...] = option(
        (),
        help="the same for validation",
        argument="supervised_valid_data",
        nargs="+",
        metavar="FILE",
        is_path=True,
    )
