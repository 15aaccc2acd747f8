"""A stand-in for TransformerEngine in Megatron-core's layer spec: modules that have the names of its parameters.

It shows that the spec is assembled and its parameters are found; TransformerEngine's own modules have not been run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.models.gpt import gpt_layer_specs
from torch import Tensor, nn

from opt_megatron.model.attention import OPTCoreAttention
from opt_megatron.model.linear import OPTColumnParallelLinear, OPTRowParallelLinear, mark_sequence_parallel
from opt_megatron.model.spec import OPTLayerNorm


class LayerNormColumnParallelLinear(OPTColumnParallelLinear):
    """A norm and the linear layer after it, in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        for name in ("layer_norm_weight", "layer_norm_bias"):
            parameter = nn.Parameter(torch.empty(input_size))
            mark_sequence_parallel(parameter, config.sequence_parallel)
            self.register_parameter(name, parameter)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, inputs] -> [s, b, outputs of this rank], and no bias"""
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        normed = nn.functional.layer_norm(input_, weight.shape, weight, bias, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


class SpecProvider:
    """The modules that core's spec asks TransformerEngine for."""

    def fuse_layernorm_and_linear(self) -> bool:
        """The norm is in the linear layer."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """linear_qkv and linear_fc1"""
        return LayerNormColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """linear_proj and linear_fc2"""
        return OPTRowParallelLinear

    def core_attention(self) -> type:
        """core_attention"""
        return OPTCoreAttention

    def layer_norm(self, **kwargs: Any) -> type:
        """Norms of queries and keys, which OPT has not."""
        return OPTLayerNorm


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """As if TransformerEngine were installed."""
    stubs = {"HAVE_TE": True, "TESpecProvider": SpecProvider, "TENorm": OPTLayerNorm}
    with mock.patch.multiple(gpt_layer_specs, create=True, **stubs):
        yield
