"""What a checkpoint format is: how its files are recognised, how they are read, and how they are written.

A format is one object, `FORMAT`, in one module of this package, and one line of `registry.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...config import POSITION_OFFSET, OPTConfig
from ...errors import UserError
from ..output_files import DtypeOf, OutputFile

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..conversion_options import ConversionOptions


class Format(ABC):
    """A format that can be read.

    Attributes:
        title: the name in messages.
        detection_rank: `detect` is called in this order, lowest first, and the first format that returns
            True is used: formats with special file names come before those with general ones.
        model_file_suffixes: suffixes of a single file that is a whole model.
        file_names: a regular expression of the files, as paths relative to its directory, that it consists of besides
            config.json, the tokenizer's and the like. Only a directory that holds nothing else is replaced by --force,
            and none of a format that this program does not write.
    """

    title: ClassVar[str]
    file_names: ClassVar[str] = ""
    detection_rank: ClassVar[int]
    model_file_suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def detect(self, directory: Path) -> bool:
        """Whether the directory's file names are this format's. Nothing is opened."""

    @abstractmethod
    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a checkpoint lazily: names and shapes are known, no weight is read.

        Args:
            path: a directory, or a file with one of `model_file_suffixes`.
            config: used instead of the one that the files hold or that can be inferred from them.

        Raises:
            CheckpointError: files are missing, damaged or not of one model.
        """


class OutputFormat(Format):
    """A format that can be written, too.

    Attributes:
        has_tensor_parts: tensors can be split into `tensor_model_parallel_size` parts.
        is_whole_model: it holds all weights, and config, tokenizer and a manifest are written with them.
        has_pipeline_stages: layers can be divided into `pipeline_model_parallel_size` stages.
        position_offsets: rows of the position table at which a sequence may begin.
    """

    has_tensor_parts: ClassVar[bool] = True
    is_whole_model: ClassVar[bool] = True
    has_pipeline_stages: ClassVar[bool] = False
    position_offsets: ClassVar[tuple[int, ...]] = (POSITION_OFFSET,)

    def check_options(self, options: ConversionOptions) -> None:
        """Check that the format has what the options ask for.

        Raises:
            UserError: it does not.
        """
        to = options.to
        if not self.has_pipeline_stages and options.pipeline_model_parallel_size > 1:
            raise UserError(f"--to {to} has no pipeline stages; leave --pipeline-model-parallel-size at 1")
        if not self.has_tensor_parts and options.tensor_model_parallel_size > 1:
            raise UserError(f"--to {to} has whole tensors; leave --tensor-model-parallel-size at 1")
        uneven = options.decoder_first_pipeline_num_layers, options.decoder_last_pipeline_num_layers
        if not self.has_pipeline_stages and uneven != (None, None):
            raise UserError(f"--to {to} has no pipeline stages; leave the numbers of their layers out")
        if options.position_offset not in self.position_offsets:
            offsets = " or ".join(map(str, self.position_offsets))
            raise UserError(f"--position-offset is {options.position_offset}, but must be {offsets} with --to {to}")

    def content(self, checkpoint: Checkpoint, options: ConversionOptions) -> Checkpoint:
        """What is written of a checkpoint: the canonical tensors, or others that the format makes of it.

        Raises:
            UserError: the checkpoint does not have what the format holds.
        """
        return checkpoint

    @abstractmethod
    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """The weight files to write, described without reading or writing anything.

        Raises:
            UserError: the format cannot hold the model as the options ask for it.
        """

    def text_files(self, checkpoint: Checkpoint, files: list[OutputFile]) -> dict[str, str]:
        """File name -> content of the small text files that belong to the weight files."""
        return {}

    def write_companions(self, directory: Path, config: OPTConfig, options: ConversionOptions) -> list[str]:
        """Write what the format's program opens besides; the config and the tokenizer's files are there already.

        Returns:
            Sentences about what the program will miss.
        """
        return []

    def describe_output(self, options: ConversionOptions) -> str:
        """What was written, for the last line that `convert` prints."""
        if not self.has_tensor_parts:
            return self.title
        parts = options.tensor_model_parallel_size
        return f"{self.title}, {parts} part" + ("s" if parts > 1 else "")

    def notes(self, config: OPTConfig, options: ConversionOptions) -> list[str]:
        """Sentences that the user should read about what was written."""
        return []
