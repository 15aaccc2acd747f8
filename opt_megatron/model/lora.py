"""LoRA: W x + (alpha / rank) B A x with W frozen, as layers that a spec uses instead of the linear ones.

(Hu et al. 2021, arXiv:2106.09685.) The factor with the dimension that tensor parallelism divides is divided
with it, so that the sum of both products needs no further collective of that size:

    column parallel     A [rank, I] on every rank       B [O / TP, rank]
    row parallel        A [rank, I / TP]                B [O, rank] on every rank

A row-parallel layer therefore all-reduces `rank` numbers per token in addition to its output.

Where q, k and v have an A each, as in adapters of peft, linear_qkv's A holds the rows of the three one after another,
and a mask keeps B at 0 except where the rows of q meet the columns of q's A, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from .differentiable_linear import differentiable_linear
from .linear import OPTColumnParallelLinear, OPTRowParallelLinear, PackableLinear, mark_sequence_parallel
from .linear_methods.base import LinearMethod
from .lora_options import LoRALayer

FACTORS = ("lora_a", "lora_b")


class _LoRA(PackableLinear):
    """A linear layer with a frozen weight and the two factors.

    `lora_a` is initialised as torch's nn.Linear (Kaiming-uniform, as in PEFT) and `lora_b` with zeros: training
    starts from the frozen model. training/init_weights.py fills them, the same at every layout.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_b_mask: Tensor | None
    config: TransformerConfig

    def _add_factors(self, lora: LoRALayer, *, a_is_divided: bool, b_is_divided: bool) -> None:
        self.lora = lora
        weight = self.float_weight()
        outputs, inputs = weight.shape
        self.lora_a = nn.Parameter(weight.new_zeros(lora.rank, inputs))
        self.lora_b = nn.Parameter(weight.new_zeros(outputs, lora.rank))
        self.register_buffer("lora_b_mask", self._mask_of_b() if len(lora.ranks) > 1 else None, persistent=False)
        for factor, dim, divided in ((self.lora_a, 1, a_is_divided), (self.lora_b, 0, b_is_divided)):
            set_tensor_model_parallel_attributes(factor, divided, dim, 1)
            # A whole factor sees one part of the sequence on each rank; the mark makes core sum its gradients.
            mark_sequence_parallel(factor, self.sequence_parallel and not divided)
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _mask_of_b(self) -> Tensor:
        """[outputs, rank]: 1 where an output (of q, k or v, interleaved by head) belongs to a row of A, else 0."""
        mask = torch.zeros_like(self.lora_b)
        by_head = mask.unflatten(0, (-1, len(self.lora.ranks), self.config.kv_channels))
        start = 0
        for part, rank in enumerate(self.lora.ranks):
            by_head[:, part, :, start : start + rank] = 1
            start += rank
        return mask

    def _update(self, low: Tensor) -> Tensor:
        """The scaled product of B with A x, `low` [s, b, rank]."""
        b = self.lora_b if self.lora_b_mask is None else self.lora_b * self.lora_b_mask
        return self.lora.scale * differentiable_linear(low, b, None)

    def prepare_inference(self, method: type[LinearMethod]) -> None:
        """Merge the factors into the weight and drop them, then prepare as an ordinary layer does."""
        if not self._is_merged():
            weight = self.float_weight()
            with torch.no_grad():
                weight.add_(self.lora.scale * (self.lora_b.float() @ self.lora_a.float()).to(weight.dtype))
            for name in FACTORS:
                self.register_parameter(name, None)
        super().prepare_inference(method)

    def _is_merged(self) -> bool:
        return self.lora_a is None


class LoRAColumnParallelLinear(_LoRA, OPTColumnParallelLinear):
    """Column parallel: B is divided with the outputs."""

    def __init__(self, *args: Any, lora: LoRALayer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_factors(lora, a_is_divided=False, b_is_divided=True)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs] -> [s, b, outputs of this rank], and no bias"""
        output, bias = super().forward(input_, *args, **kwargs)
        if self._is_merged():
            return output, bias
        low = differentiable_linear(input_, self.lora_a, None)  # [s, b, rank]
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self._update(low), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Core's sharded state, with the factors."""
        return _with_factors(self, super().sharded_state_dict, {"lora_b": 0}, prefix, sharded_offsets, metadata)


class LoRARowParallelLinear(_LoRA, OPTRowParallelLinear):
    """Row parallel: A is divided with the inputs."""

    def __init__(self, *args: Any, lora: LoRALayer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_factors(lora, a_is_divided=True, b_is_divided=False)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs of this rank] -> [s, b, outputs], and the bias where core leaves it to the caller"""
        output, bias = super().forward(input_)
        if self._is_merged():
            return output, bias
        low = differentiable_linear(input_, self.lora_a, None)  # [s, b, rank], this rank's part of a sum
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self._update(low), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Core's sharded state, with the factors."""
        return _with_factors(self, super().sharded_state_dict, {"lora_a": 1}, prefix, sharded_offsets, metadata)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, _LoRA]]:
    """Name and layer of each layer that has factors."""
    for name, module in model.named_modules():
        if isinstance(module, _LoRA) and not module._is_merged():
            yield name, module


def freeze_all_but_factors(model: nn.Module) -> None:
    """Make the factors the only parameters that need gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name))


def is_factor(name: str) -> bool:
    """Whether a parameter of this name is one of LoRA's."""
    return name.rpartition(".")[2] in FACTORS


def _with_factors(
    layer: _LoRA, of_core: Any, divided: dict[str, int], prefix: str, sharded_offsets: tuple, metadata: Any
) -> dict[str, Any]:
    # Core's method knows only a weight and a bias, and would treat the factors as not divided.
    values = {name: getattr(layer, name) for name in FACTORS if getattr(layer, name) is not None}
    sharded = of_core(prefix, sharded_offsets, metadata)
    for name in FACTORS:
        sharded.pop(prefix + name, None)
    axes = {name: axis for name, axis in divided.items() if name in values}
    groups = {"tp_group": layer.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    return sharded | make_sharded_tensors_for_checkpoint(values, prefix, axes, sharded_offsets, **groups)
