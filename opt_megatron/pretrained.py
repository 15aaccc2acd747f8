"""Loading, in the order in which mistakes are reported: arguments, ranks, checkpoint, layout, tokenizer, weights.

`OPT.from_pretrained` and every command that runs a model load it through here:

    parallel = start_parallel(2, 1)                     what needs no model is checked before the ranks connect
    pretrained = open_pretrained("opt-125m", parallel)  config and tokenizer; no weights are read
    model = pretrained.load_model()                     this rank's part of them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.load import load_model, open_on_all_ranks
from .checkpoint.locate import locate
from .config import OPTConfig, check_dtype
from .errors import CheckpointError, UserError
from .generation.generation_config import GenerationConfig, read_generation_config
from .parallel.context import ParallelContext, check_seed, init_parallel, on_all_ranks
from .parallel.heartbeat import LostRankPolicy
from .parallel.launch_environment import world_size_from_environment
from .parallel.layout import check_layout
from .tokenizer import OPTTokenizer

if TYPE_CHECKING:
    from .model.opt_model import OPTModel


@dataclass(frozen=True)
class Pretrained:
    """A model whose weights can be loaded, or have been made elsewhere.

    Attributes:
        name: the name or directory that it was opened by, and that of its adapter.
        tokenizer: None where there is none.
        checkpoint: opened; None for a model that was not read from one.
        tokenizer_error: why there is no tokenizer.
        tokenizer_directory: where its files are, if not next to the weights.
        generation_config: what the checkpoint's generation_config.json says; without effect where it is not used.
    """

    name: str
    parallel: ParallelContext
    config: OPTConfig
    tokenizer: OPTTokenizer | None
    checkpoint: Checkpoint | None = None
    tokenizer_error: CheckpointError | None = None
    tokenizer_directory: Path | None = None
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids each of which ends a text."""
        return self.generation_config.eos_token_ids or (self.config.eos_token_id,)

    @property
    def suppress_tokens(self) -> tuple[int, ...]:
        """Ids that are never generated: those that belong to no token, and the generation config's."""
        if self.tokenizer is None:
            unused = tuple(range(self.config.num_tokens, self.config.vocab_size))
        else:
            unused = self.tokenizer.unused_ids(self.config.vocab_size)
        return unused + self.generation_config.suppress_tokens

    def require_tokenizer(self) -> OPTTokenizer:
        """The tokenizer.

        Raises:
            CheckpointError: there is none.
        """
        if self.tokenizer is None:
            raise self.tokenizer_error or CheckpointError(f"{self.name} has no tokenizer")
        return self.tokenizer

    def load_model(self, dtype: str = "auto", *, quantization: str | None = None) -> OPTModel:
        """Read this rank's part of the weights into a new model (`checkpoint.load.load_model`); on every rank."""
        if self.checkpoint is None:
            raise UserError(f"{self.name} was not opened from a checkpoint, so there are no weights to load")
        return load_model(self.checkpoint, self.config, self.parallel, dtype, quantization=quantization)


def start_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    *,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 1234,
    options: Mapping[str, object] | None = None,
    lost_ranks: LostRankPolicy | None = None,
) -> ParallelContext:
    """Check what needs no model, and start the ranks (`init_parallel`): tensor x pipeline of them, no data parallelism.

    Args:
        options, lost_ranks: as for `init_parallel`.

    Raises:
        UserError: the layout does not fit the number of processes, an argument is out of its range, or not the same
            on all ranks.
    """
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    world_size = dist.get_world_size() if dist.is_initialized() else world_size_from_environment()
    check_layout(None, tp, pp, world_size, data_parallel=False)
    check_seed(seed)
    if dtype != "auto":
        check_dtype(dtype)
    return init_parallel(tp, pp, seed=seed, device=device, options=options, lost_ranks=lost_ranks)


def open_pretrained(
    name: str,
    parallel: ParallelContext,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    config: OPTConfig | None = None,
    tokenizer: str | None = None,
    needs_tokenizer: bool = True,
    use_generation_config: bool = True,
) -> Pretrained:
    """Open a checkpoint; called on every rank.

    Args:
        name: as for --load: a directory, a released size, a Hub repository, or "story".
        adapter: an adapter of peft that is added to the weights: a directory or a Hub repository.
        config: used instead of the checkpoint's own.
        tokenizer: where its files are; by default next to the weights.
        needs_tokenizer: a missing tokenizer is an error. It always is where `tokenizer` was given.
        use_generation_config: read the checkpoint's generation_config.json.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    checkpoint = open_on_all_ranks(name, parallel, revision, config, adapter)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_layout(checkpoint.config, tp, pp, parallel.world_size)

    def read() -> Pretrained:
        own_directory = None if tokenizer is None else locate(tokenizer)
        generation_config = GenerationConfig()
        if use_generation_config:
            generation_config = read_generation_config(checkpoint.directory, checkpoint.config.vocab_size)
        full_name = name if adapter is None else f"{name} with {adapter}"
        opened = Pretrained(
            full_name, parallel, checkpoint.config, None, checkpoint, None, own_directory, generation_config
        )
        try:
            # Of a training run, `checkpoint.path` is the newest checkpoint.
            return replace(opened, tokenizer=_read_tokenizer(own_directory or checkpoint.path, checkpoint.config))
        except CheckpointError as error:
            if needs_tokenizer or tokenizer is not None:
                raise
            return replace(opened, tokenizer_error=error)  # the model can still be run with ids

    return on_all_ranks(parallel, read)


def _read_tokenizer(directory: Path, config: OPTConfig) -> OPTTokenizer:
    """The tokenizer of a directory.

    Raises:
        CheckpointError: there is none.
        UserError: it has more entries than the model has rows.
    """
    tokenizer = OPTTokenizer.from_directory(directory)
    tokenizer.check_fits(config.vocab_size)
    return tokenizer
