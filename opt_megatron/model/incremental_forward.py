"""The forward pass of generation: the model's own modules, called without what only training needs.

GPTModel's forward is made for whole batches of sequences with gradients. Here the tokens of a step are the rows of
one tensor [T, H], whichever requests they belong to: prompts need no padding, decoding sequences and chunks of
prompts share each product, and a layer is twelve calls of torch. Only attention distinguishes requests, in the
KV cache (`generation/core/kv_cache.py`).

T = tokens of the step, H = hidden_size, n = attention heads of this rank, d = head_dim, V = vocabulary rows
of this rank, R = tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from ..config import POSITION_OFFSET
from ..parallel.collectives import tensor_parallel_collectives
from ..parallel.context import ParallelContext
from .opt_model import OPTModel


class AttentionBackend(Protocol):
    """Attention over a KV cache, as a layer calls it."""

    def attend(self, layer: int, query_key_value: Tensor) -> Tensor:
        """Store the keys and values of [T, n, 3, d] in the cache, and return the attention's output [T, n * d]."""


Attend = Callable[[int, Tensor], Tensor]


class IncrementalForward:
    """Runs this rank's part of a model, one step at a time.

    Args:
        model: its weights are packed by a linear method (`OPTModel.prepare_inference`).
        skip_silent_neurons: fc2's weights of neurons that ReLU has silenced need not be read.

    Attributes:
        num_layers: of this pipeline stage.
        hidden_size, dtype: H, and the dtype of hidden states.
    """

    def __init__(self, model: OPTModel, parallel: ParallelContext, *, skip_silent_neurons: bool = True) -> None:
        model.prepare_inference()
        for layer in model.decoder.layers:
            layer.mlp.linear_fc2.skip_zeros = skip_silent_neurons
        self.collectives = tensor_parallel_collectives(parallel)
        self._model = model
        self._all_reduce = self.collectives.all_reduce
        heads = model.opt_config.num_attention_heads // parallel.tensor_model_parallel_size
        self._head_shape = (heads, 3, model.opt_config.head_dim)  # Megatron's order within linear_qkv
        self._run_layer = self._pre_norm if model.opt_config.do_layer_norm_before else self._post_norm
        bind = _bind_pre_norm if model.opt_config.do_layer_norm_before else _bind_post_norm
        self._layers = [bind(layer) for layer in model.decoder.layers]
        final_norm = model.decoder.final_layernorm
        self._final_norm = None if final_norm is None else _bound_norm(final_norm)
        self.num_layers = len(self._layers)
        self.hidden_size, self.dtype = model.opt_config.hidden_size, model.params_dtype

    @torch.inference_mode()
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """ids and positions [T] -> [T, H]; on the first pipeline stage."""
        embedding = self._model.embedding
        rows = self._all_reduce(embedding.word_embeddings.local_rows(tokens))
        return embedding.word_embeddings.project(rows) + embedding.position_embeddings(positions + POSITION_OFFSET)

    @torch.inference_mode()
    def run_layers(self, hidden: Tensor, cache: AttentionBackend) -> Tensor:
        """[T, H] -> [T, H] through the layers of this stage, and on the last stage through the final norm."""
        run_layer, attend = self._run_layer, cache.attend
        for number, layer in enumerate(self._layers):
            hidden = run_layer(hidden, layer, attend, number)
        return hidden if self._final_norm is None else self._final_norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, V] in float32; on the last pipeline stage."""
        return self._model.output_layer.infer(hidden).float()

    def _pre_norm(self, x: Tensor, layer: _Layer, attend: Attend, number: int) -> Tensor:
        query_key_value = layer.qkv(layer.attention_norm(x)).unflatten(-1, self._head_shape)
        x = self._all_reduce(layer.projection(attend(number, query_key_value), x))
        return self._all_reduce(layer.fc2(layer.fc1(layer.mlp_norm(x), relu=True), x))

    def _post_norm(self, x: Tensor, layer: _Layer, attend: Attend, number: int) -> Tensor:
        query_key_value = layer.qkv(x).unflatten(-1, self._head_shape)
        x = layer.attention_norm(self._all_reduce(layer.projection(attend(number, query_key_value), x)))
        return layer.mlp_norm(self._all_reduce(layer.fc2(layer.fc1(x, relu=True), x)))


@dataclass(frozen=True, slots=True)
class _Layer:
    """A TransformerLayer's functions, looked up once: a module searches three dictionaries for each attribute."""

    attention_norm: Callable[[Tensor], Tensor]
    qkv: Callable[[Tensor], Tensor]
    projection: Callable[[Tensor, Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    fc1: Callable[..., Tensor]
    fc2: Callable[[Tensor, Tensor], Tensor]


def _bind_pre_norm(layer: TransformerLayer) -> _Layer:
    return _bind(layer, layer.input_layernorm, layer.pre_mlp_layernorm)


def _bind_post_norm(layer: TransformerLayer) -> _Layer:
    return _bind(layer, layer.self_attn_bda.norm, layer.mlp_bda.norm)


def _bind(layer: TransformerLayer, attention_norm: nn.Module, mlp_norm: nn.Module) -> _Layer:
    return _Layer(
        _bound_norm(attention_norm),
        layer.self_attention.linear_qkv.infer,
        layer.self_attention.linear_proj.infer,
        _bound_norm(mlp_norm),
        layer.mlp.linear_fc1.infer,
        layer.mlp.linear_fc2.infer,
    )


def _bound_norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if not isinstance(module, nn.LayerNorm):  # Apex's or TransformerEngine's
        return module
    shape, weight, bias, epsilon = module.normalized_shape, module.weight, module.bias, module.eps
    return partial(torch.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=epsilon)
