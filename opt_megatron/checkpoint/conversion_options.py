"""`ConversionOptions`: what a conversion writes, checked when it is made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check_dtype
from ..errors import UserError
from ..options import Options, Size, option
from ..parallel.layout import check_sizes
from .formats.registry import output_format, output_format_names

_NAMES = output_format_names()


@dataclass(frozen=True)
class ConversionOptions(Options):
    """What a conversion writes.

    Raises:
        UserError: a value is out of its range, or the format does not have what it asks for.
    """

    to: str = option("megatron", help=f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}", metavar="FORMAT")
    tensor_model_parallel_size: int = option(
        1, help="Megatron's ranks that share each layer, metaseq's and FlagAI's parts", metavar="T"
    )
    pipeline_model_parallel_size: int = option(1, help="Megatron's stages, each with a part of the layers", metavar="P")
    decoder_first_pipeline_num_layers: int | None = option(None, help="layers of the first stage, if not as the others")
    decoder_last_pipeline_num_layers: int | None = option(None, help="layers of the last stage, if not as the others")
    position_offset: int = option(
        2,
        help="row of the position table at which a sequence begins; 0, for Megatron-LM, leaves out the two before it",
        metavar="0|2",
    )
    dtype: str | None = option(
        None, help="float32, float16 or bfloat16", default_text="every tensor stays as it is stored"
    )
    max_shard_size: Size = option("5GB", help="of a file with --to hf", metavar="SIZE")

    def __post_init__(self) -> None:
        super().__post_init__()
        written = output_format(self.to)
        if self.dtype is not None:
            check_dtype(self.dtype)
        check_sizes(self.tensor_model_parallel_size, self.pipeline_model_parallel_size)
        written.check_options(self)
        if self.max_shard_size < 1:
            raise UserError(f"the largest shard is {self.max_shard_size} bytes, but must be at least 1")
