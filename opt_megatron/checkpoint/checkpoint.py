"""`Checkpoint`: an opened checkpoint of any format, with its tensors not yet read.

Formats return it; conversion, loading and verification read from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..config import OPTConfig
from ..errors import CheckpointError, shorten
from .adapter import Adapter
from .parameter_mapping import canonical_shapes
from .storage.blocks import Block, whole
from .storage.lazy_tensor import LazyTensor


@dataclass
class Checkpoint:
    """An opened checkpoint: its config and its canonical tensors, none of them read yet.

    Attributes:
        path: the directory, or the one file.
        format_description: what the files are, in words ("Hugging Face safetensors", "Megatron TP2 x PP1").
        tensors: canonical name -> lazy tensor.
        config_notes: sentences about what was inferred of the config because the files do not carry one.
        ranks: for a Megatron directory, each rank's name and what it holds.
        adapter: LoRA's factors that are added to the tensors as they are read.
        base: where the weights are, if `path` holds only what is done to them.
        bytes_read: bytes returned by `read` so far.
    """

    path: Path
    format_description: str
    config: OPTConfig
    tensors: dict[str, LazyTensor]
    config_notes: list[str] = field(default_factory=list)
    ranks: list[tuple[str, str]] = field(default_factory=list)
    adapter: Adapter | None = None
    base: Path | None = None
    bytes_read: int = 0

    @property
    def directory(self) -> Path:
        """Where the files beside the weights are: config, tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    def read(self, name: str, block: Block | None = None) -> Tensor:
        """A block of a canonical tensor, by default all of it; never to be written to.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            lazy = self.tensors[name]
            tensor = lazy.read(whole(lazy.shape) if block is None else block)
        except CheckpointError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def check_tensors(self) -> None:
        """Compare names and shapes with the config.

        Raises:
            CheckpointError: names the missing, the unknown and the misshapen tensors.
        """
        wanted = canonical_shapes(self.config)
        missing = [name for name in wanted if name not in self.tensors]
        unknown = [name for name in self.tensors if name not in wanted]
        misshapen = [
            f"{name} is {list(tensor.shape)}, the config says {list(wanted[name])}"
            for name, tensor in self.tensors.items()
            if name in wanted and tensor.shape != wanted[name]
        ]
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        strange = [f"{name} is {tensor.dtype}" for name, tensor in self.tensors.items() if tensor.dtype not in kinds]
        problems = [
            f"{len(names)} {what}: {shorten(names, 4)}"
            for names, what in (
                (missing, "missing"),
                (unknown, "unknown"),
                (misshapen, "misshapen"),
                (strange, "of a dtype that OPT is not stored in"),
            )
            if names
        ]
        if problems:
            raise CheckpointError(
                f"{self.path}: the tensors do not fit the config ({'; '.join(problems)}); "
                "use the files and the config of one model"
            )
