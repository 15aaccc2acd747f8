"""A checkpoint under any of its names, opened on every rank: its config, its tokenizer, and models of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.formats.registry import open_checkpoint
from .checkpoint.load import load_model, locate_on_all_ranks
from .checkpoint.locate import locate
from .config import OPTConfig
from .errors import CheckpointError, UserError
from .parallel.context import ParallelContext, on_all_ranks
from .parallel.layout import check_layout
from .tokenizer import OPTTokenizer

if TYPE_CHECKING:
    from .model.opt_model import OPTModel


@dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint.

    Attributes:
        name: what it was opened by.
        tokenizer: None where there is none.
    """

    name: str
    parallel: ParallelContext
    checkpoint: Checkpoint
    tokenizer: OPTTokenizer | None

    @property
    def config(self) -> OPTConfig:
        """The architecture."""
        return self.checkpoint.config

    @property
    def num_tokens(self) -> int:
        """Ids from this one on are vocabulary padding."""
        return min(self.config.num_tokens, len(self.tokenizer) if self.tokenizer else self.config.num_tokens)

    def load_model(self, dtype: str = "auto", *, quantization: str | None = None) -> OPTModel:
        """This rank's part of a model, read anew (`checkpoint.load.load_model`); called on every rank."""
        return load_model(self.checkpoint, self.config, self.parallel, dtype, quantization=quantization)


def open_pretrained(
    name: str,
    parallel: ParallelContext,
    *,
    revision: str | None = None,
    config: OPTConfig | None = None,
    tokenizer: str | None = None,
    needs_tokenizer: bool = True,
) -> Pretrained:
    """Open a checkpoint; called on every rank.

    Args:
        name: as of --load: a directory, a released size, a Hub repository, or "story".
        config: instead of what the checkpoint says of itself.
        tokenizer: where its files are; by default beside the weights.
        needs_tokenizer: a missing one is an error, unless `tokenizer` was given, in which case it always is.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    directory = locate_on_all_ranks(name, parallel, revision)
    checkpoint = on_all_ranks(parallel, lambda: open_checkpoint(directory, config))
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_layout(checkpoint.config, tp, pp, parallel.world_size)

    def read() -> OPTTokenizer | None:
        try:
            return read_tokenizer(tokenizer, checkpoint.path, checkpoint.config)  # of a run, its newest checkpoint's
        except CheckpointError:
            if needs_tokenizer or tokenizer is not None:
                raise
            return None  # ids go in, and ids come out

    return Pretrained(name, parallel, checkpoint, on_all_ranks(parallel, read))


def read_tokenizer(name: str | None, directory: Path, config: OPTConfig) -> OPTTokenizer:
    """The tokenizer of --tokenizer, or the one beside the weights.

    Raises:
        CheckpointError: there is none.
        UserError: it has more entries than the model has rows.
    """
    tokenizer = OPTTokenizer.from_directory(directory if name is None else locate(name))
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model {config.vocab_size} rows: "
            "it is another model's; give --tokenizer DIR"
        )
    return tokenizer
