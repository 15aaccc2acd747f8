"""In which form a compressed layer is stored: as floats (Hugging Face), or as integers (GPTQ's layout).

A rank sends its rows of some tensors to the leader, which makes of the whole ones what is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.conversion_options import ConversionOptions
from ..checkpoint.formats import gptq, huggingface
from ..checkpoint.formats.format import Format
from ..checkpoint.output_files import OutputFile, StoredTensor
from ..checkpoint.parameter_mapping import canonical_shapes
from ..checkpoint.storage.blocks import whole
from ..checkpoint.storage.packed_bits import PER_STREAM, pack_bits
from ..config import OPTConfig
from ..errors import UserError
from .decoder_layer import LINEARS, layer_prefix, layer_shapes
from .grid import GroupedGrids, columns_per_group
from .recipe import WHOLE_ROW, Quantize, Recipe


class SentTensor(NamedTuple):
    """What is sent of a layer: shape and dtype of a whole tensor, of which ranks may have rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_rows: bool


class StoredLayout(ABC):
    """The form of the layers.

    Args:
        source: the checkpoint that is compressed.
        dtype: of the layers' floats.
        options: of the files.

    Attributes:
        format: reads what is written.
        scales: dtype of the scales of integers; None for floats.
        read_dtype: of the weights as `format` reads them.
    """

    format: Format
    scales: torch.dtype | None = None

    def __init__(self, source: Checkpoint, dtype: torch.dtype, options: ConversionOptions) -> None:
        self._source, self.dtype, self._options = source, dtype, options
        self.read_dtype = dtype

    @property
    def config(self) -> OPTConfig:
        """The model's."""
        return self._source.config

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a float tensor is stored: the layers' in one dtype, others as they were if none was asked for."""
        is_of_layer = ".layers." in name
        return self.dtype if is_of_layer or self._options.dtype is not None else self._source.tensors[name].dtype

    def output_files(self) -> list[OutputFile]:
        """The files to write."""
        tensors = [stored for name in canonical_shapes(self.config) for stored in self._stored_tensors(name)]
        return huggingface.safetensors_files(tensors, self._options.max_shard_size)

    def stored_names(self, number: int) -> list[str]:
        """The names of a layer's tensors in the files."""
        names = [layer_prefix(number) + name for name in layer_shapes(self.config, number)]
        return [stored.name for name in names for stored in self._stored_tensors(name)]

    def sent(self, number: int) -> dict[str, SentTensor]:
        """What is sent of a layer, by names of its own."""
        return {
            name: SentTensor(shape, self.dtype, name.rpartition(".")[0] in LINEARS)
            for name, shape in layer_shapes(self.config, number).items()
        }

    def own_part(self, tensors: dict[str, Tensor], grids: dict[str, GroupedGrids]) -> dict[str, Tensor]:
        """This rank's part of what is sent."""
        return {name: tensor.to(self.dtype) for name, tensor in tensors.items()}

    def stored(self, number: int, sent: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is written of a layer, by the names in the files, from the whole tensors that were sent."""
        return {layer_prefix(number) + name: tensor for name, tensor in sent.items()}

    def settings(self) -> dict[str, Any] | None:
        """What config.json says of the quantisation; None of floats."""
        return None

    @abstractmethod
    def _stored_tensors(self, name: str) -> list[StoredTensor]:
        """What is written of a canonical tensor."""

    def _as_it_is(self, name: str) -> list[StoredTensor]:
        return [StoredTensor.of_block(name, name, whole(canonical_shapes(self.config)[name]), self.dtype_of(name))]


class FloatLayout(StoredLayout):
    """Hugging Face's tensors with the rounded values and the zeros."""

    format = huggingface.FORMAT

    def _stored_tensors(self, name: str) -> list[StoredTensor]:
        return self._as_it_is(name)


class GPTQLayout(StoredLayout):
    """GPTQ's layout: the linears as integers, with scales in float16.

    Zeros of symmetric grids are stored less one, as every reader has it; those of asymmetric ones as they are
    ("gptq_v2"), since a zero of 0 has no value below it.

    Raises:
        UserError: the recipe does not quantise, or the matrices' sizes cannot be packed.
    """

    format = gptq.FORMAT
    scales = torch.float16

    def __init__(self, source: Checkpoint, dtype: torch.dtype, options: ConversionOptions, recipe: Recipe) -> None:
        super().__init__(source, dtype, options)
        if recipe.quantize is None:
            raise UserError("--to gptq stores integers, and the recipe has no step quantize")
        self._quantize: Quantize = recipe.quantize
        self.read_dtype = torch.float32
        for size, what in ((self.config.hidden_size, "hidden_size"), (self.config.ffn_hidden_size, "ffn_hidden_size")):
            if size % PER_STREAM or size % columns_per_group(self._quantize, size):
                raise UserError(
                    f"--to gptq: the model's {what} of {size} does not divide by {PER_STREAM} and by the group_size of "
                    f"{self._quantize.group_size}: use another group_size, or --to hf"
                )

    def sent(self, number: int) -> dict[str, SentTensor]:
        """See StoredLayout."""
        sent = {}
        for name, tensor in super().sent(number).items():
            linear = _linear_of(name)
            if linear is None:
                sent[name] = tensor
                continue
            rows, columns = tensor.shape
            groups = columns // columns_per_group(self._quantize, columns)
            sent[f"{linear}.codes"] = SentTensor((rows, columns), torch.uint8, True)
            sent[f"{linear}.scales"] = SentTensor((rows, groups), torch.float16, True)
            sent[f"{linear}.zeros"] = SentTensor((rows, groups), torch.uint8, True)
            sent[f"{linear}.groups"] = SentTensor((columns,), torch.int32, False)
        return sent

    def own_part(self, tensors: dict[str, Tensor], grids: dict[str, GroupedGrids]) -> dict[str, Tensor]:
        """See StoredLayout."""
        part = {name: tensor.to(self.dtype) for name, tensor in tensors.items() if _linear_of(name) is None}
        for linear, grid in grids.items():
            part[f"{linear}.codes"] = grid.codes(tensors[f"{linear}.weight"])
            part[f"{linear}.scales"] = grid.scales.to(torch.float16)
            part[f"{linear}.zeros"] = grid.zeros.to(torch.uint8)
            part[f"{linear}.groups"] = grid.group_of.to(torch.int32)
        return part

    def stored(self, number: int, sent: dict[str, Tensor]) -> dict[str, Tensor]:
        """See StoredLayout."""
        prefix, bits, made = layer_prefix(number), self._quantize.bits, {}
        for name, tensor in sent.items():
            linear, _, kind = name.rpartition(".")
            if kind == "codes":
                zeros = (sent[f"{linear}.zeros"] - self._zero_offset) & (2**bits - 1)
                made[f"{prefix}{linear}.qweight"] = pack_bits(tensor.t(), bits)
                made[f"{prefix}{linear}.qzeros"] = pack_bits(zeros, bits).t().contiguous()
                made[f"{prefix}{linear}.scales"] = sent[f"{linear}.scales"].t().contiguous()
                made[f"{prefix}{linear}.g_idx"] = sent[f"{linear}.groups"]
            elif kind in ("weight", "bias"):
                made[prefix + name] = tensor
        return made

    def settings(self) -> dict[str, Any]:
        """See StoredLayout."""
        quantize = self._quantize
        return {
            "quant_method": "gptq",
            "bits": quantize.bits,
            "group_size": quantize.group_size,
            "damp_percent": quantize.damping,
            "desc_act": quantize.act_order and not quantize.static_groups and quantize.group_size != WHOLE_ROW,
            "static_groups": quantize.static_groups,
            "sym": self._zero_offset == 1,
            "true_sequential": False,
            "checkpoint_format": "gptq" if self._zero_offset else "gptq_v2",
            "model_file_base_name": "model",
        }

    @property
    def _zero_offset(self) -> int:
        return 1 if self._quantize.symmetric or self._quantize.method == "absmax" else 0

    def _stored_tensors(self, name: str) -> list[StoredTensor]:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or _linear_of(name.split(".layers.")[-1].partition(".")[2]) is None:
            return self._as_it_is(name)
        rows, columns = canonical_shapes(self.config)[name]
        groups, bits = columns // columns_per_group(self._quantize, columns), self._quantize.bits
        shapes = {
            "qweight": ((columns * bits // 32, rows), torch.int32),
            "qzeros": ((groups, rows * bits // 32), torch.int32),
            "scales": ((groups, rows), torch.float16),
            "g_idx": ((columns,), torch.int32),
        }
        return [
            StoredTensor.of_block(f"{module}.{part}", f"{module}.{part}", whole(shape), dtype)
            for part, (shape, dtype) in shapes.items()
        ]


def _linear_of(name: str) -> str | None:
    """The linear whose weight a tensor of a layer is, by the ends of the names; None if it is another tensor."""
    module, _, kind = name.rpartition(".")
    return module if kind == "weight" and module in LINEARS else None


def make_layout(
    to: str, source: Checkpoint, dtype: torch.dtype, options: ConversionOptions, recipe: Recipe
) -> StoredLayout:
    """The layout that `--to` names, "hf" or "gptq".

    Raises:
        UserError: it cannot hold what the recipe makes.
    """
    if to == "gptq":
        return GPTQLayout(source, dtype, options, recipe)
    return FloatLayout(source, dtype, options)
