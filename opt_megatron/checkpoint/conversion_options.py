"""`ConversionOptions`: what a conversion writes, checked when it is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check_dtype
from ..errors import UserError
from ..parallel.layout import check_sizes
from .formats.registry import output_format


@dataclass(frozen=True)
class ConversionOptions:
    """What to write.

    Attributes:
        to: a name of `output_format_names`.
        tensor_model_parallel_size: ranks of Megatron, parts of metaseq and FlagAI.
        decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers: of Megatron's first and last pipeline
            stage; None for as many layers as the others.
        dtype: cast to this; None keeps the bits of every tensor.
        max_shard_bytes: of one file of Hugging Face's.

    Raises:
        UserError: a value is out of its range, or the format does not have what it asks for.
    """

    to: str = "megatron"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        written = output_format(self.to)
        if self.dtype is not None:
            check_dtype(self.dtype)
        check_sizes(self.tensor_model_parallel_size, self.pipeline_model_parallel_size)
        written.check_options(self)
        if self.max_shard_bytes < 1:
            raise UserError(f"the largest shard is {self.max_shard_bytes} bytes, but must be at least 1")
