"""The hook points of a model: named tensors that can be read and replaced, whole at every layout.

    embedding                      [b, s, H]      token embeddings with positions: what the first layer reads
    layers.N                       [b, s, H]      the residual stream after layer N (from 0)
    layers.N.attention             [b, s, H]      what attention adds to it
    layers.N.attention.heads       [b, s, n, d]   what each head gives to the output projection
    layers.N.attention.weights     [b, n, s, s]   where each head looks (read-only)
    layers.N.mlp                   [b, s, H]      what the MLP adds
    layers.N.mlp.neurons           [b, s, F]      the MLP's neurons, after ReLU
    output                         [b, s, H]      after the last layer and, if there is one, the final norm

A hook gets a copy, which it may keep and write into; only what it returns reaches the model.

b = sequences, s = tokens, H = hidden_size, n = attention heads, d = head_dim, F = ffn_hidden_size. A rank holds
its part of the heads and the neurons; the ranks' parts are gathered for the hook, and a replacement is divided again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..config import OPTConfig
from ..errors import UserError
from ..parallel.collectives import Collectives, tensor_parallel_collectives
from ..parallel.context import ParallelContext
from .opt_model import OPTModel

# Called with a copy of the whole tensor at a hook point; what it returns, unless that is None, replaces the tensor.
Hook = Callable[[Tensor], Tensor | None]

EMBEDDING, OUTPUT = "embedding", "output"


@dataclass(frozen=True)
class _HookPointType:
    """What the hook points of one ending have in common.

    Attributes:
        module: a layer -> the module whose output (or first input) the tensor is.
        shape: config, sequences, tokens -> the shape of the whole tensor.
        is_input: the tensor is the module's first input.
        is_divided: a rank holds its part of the last dimension.
        is_read_only: the tensor is computed only for the hook.
    """

    module: Callable[[Any], nn.Module]
    shape: Callable[[OPTConfig, int, int], tuple[int, ...]] = lambda config, b, s: (b, s, config.hidden_size)
    is_input: bool = False
    is_divided: bool = False
    is_read_only: bool = False


_MODEL_TYPES = {
    EMBEDDING: _HookPointType(lambda model: model.embedding),
    OUTPUT: _HookPointType(lambda model: model.decoder),
}
_LAYER_TYPES = {  # by what follows "layers.N."
    "": _HookPointType(lambda layer: layer),
    "attention": _HookPointType(lambda layer: layer.self_attention),
    "attention.heads": _HookPointType(
        lambda layer: layer.self_attention.core_attention,
        lambda config, b, s: (b, s, config.num_attention_heads, config.head_dim),
        is_divided=True,
    ),
    "attention.weights": _HookPointType(
        lambda layer: layer.self_attention.core_attention,
        lambda config, b, s: (b, config.num_attention_heads, s, s),
        is_input=True,
        is_read_only=True,
    ),
    "mlp": _HookPointType(lambda layer: layer.mlp),
    "mlp.neurons": _HookPointType(
        lambda layer: layer.mlp.linear_fc2,
        lambda config, b, s: (b, s, config.ffn_hidden_size),
        is_input=True,
        is_divided=True,
    ),
}
_NAME = re.compile(r"layers\.(\d+)(?:\.(.+))?")


@dataclass(frozen=True)
class HookPoint:
    """A parsed name; `layer` is None outside the layers."""

    name: str
    type: _HookPointType
    layer: int | None

    def shape(self, config: OPTConfig, batch: int, tokens: int) -> tuple[int, ...]:
        """The shape of the whole tensor, for `batch` sequences of `tokens` tokens."""
        return self.type.shape(config, batch, tokens)

    def stage(self, config: OPTConfig, stages: int) -> int:
        """The pipeline stage, of `stages`, that has the tensor."""
        if self.layer is None:
            return 0 if self.name == EMBEDDING else stages - 1
        return self.layer // (config.num_layers // stages)

    def module(self, model: OPTModel) -> nn.Module:
        """The module whose output, or first input, the tensor is; on a rank of its stage."""
        if self.layer is None:
            return self.type.module(model)
        return self.type.module(next(one for one in model.decoder.layers if one.layer_number == self.layer + 1))


def parse_hook_point(name: str, config: OPTConfig) -> HookPoint:
    """The hook point of a name.

    Raises:
        UserError: the model has no such hook point.
    """
    if name in _MODEL_TYPES:
        return HookPoint(name, _MODEL_TYPES[name], None)
    match = _NAME.fullmatch(name)
    ending = match[2] or "" if match else None
    if match is None or ending not in _LAYER_TYPES:
        endings = ", ".join(f"layers.N.{ending}" for ending in _LAYER_TYPES if ending)
        raise UserError(f"{name!r} is no hook point; there are {EMBEDDING}, {OUTPUT}, layers.N, {endings}")
    if int(match[1]) >= config.num_layers:
        raise UserError(f"{name!r}: the model's {config.num_layers} layers are counted from 0")
    return HookPoint(name, _LAYER_TYPES[ending], int(match[1]))


def attach_hook(
    model: OPTModel, parallel: ParallelContext, point: HookPoint, hook: Hook, errors: list[Exception]
) -> RemovableHandle | None:
    """Call the hook whenever the model's ordinary forward pass reaches the hook point; None on the other stages.

    Called on every rank. The hook runs on all tensor parallel ranks of the stage with the same tensor, and must
    return the same on each.

    Args:
        errors: receives what the hook raises, or what is wrong with its result. The pass then continues with the
            tensor as it was: raised here, the error would leave the other ranks waiting for this rank's part of it.
    """
    if point.stage(model.opt_config, parallel.pipeline_model_parallel_size) != parallel.pipeline_model_parallel_rank:
        return None
    collectives = tensor_parallel_collectives(parallel)
    guarded = _guarded(point, hook, errors)
    module = point.module(model)
    if point.type.is_read_only:
        return module.register_forward_pre_hook(_attention_weights_hook(collectives, guarded))
    replace = _replacer(point, model.opt_config, parallel, collectives, guarded)
    if point.type.is_input:
        return module.register_forward_pre_hook(lambda _, inputs: (replace(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _, inputs, output: _replace_first(output, replace))


def _guarded(point: HookPoint, hook: Hook, errors: list[Exception]) -> Hook:
    """The hook, whose errors are collected instead of raised."""

    def guarded(whole: Tensor) -> Tensor | None:
        try:
            replacement = hook(whole)
            _check_replacement(point, whole, replacement)
        except Exception as error:
            errors.append(error)
            return None
        return replacement

    return guarded


def _check_replacement(point: HookPoint, whole: Tensor, replacement: Any) -> None:
    if replacement is None:
        return
    if point.type.is_read_only:
        raise UserError(f"{point.name} can be read only: its hook must return None (change attention.heads)")
    if not isinstance(replacement, Tensor) or replacement.shape != whole.shape:
        got = tuple(replacement.shape) if isinstance(replacement, Tensor) else type(replacement).__name__
        raise UserError(f"the hook at {point.name} returned {got}, but must return {tuple(whole.shape)} or None")


def _replace_first(output: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Core's modules return a tensor, or it and something else (a bias, a context)."""
    return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)


def _replacer(
    point: HookPoint, config: OPTConfig, parallel: ParallelContext, collectives: Collectives, hook: Hook
) -> Callable[[Tensor], Tensor]:
    """The function from the module's tensor [s, b, width on this rank] to the one that replaces it."""
    is_divided = point.type.is_divided
    rank = parallel.tensor_model_parallel_rank if is_divided else 0

    def replace(local: Tensor) -> Tensor:
        # A copy, because core writes into the memory of some of these (it adds the residual stream in place).
        whole = collectives.all_gather(local) if is_divided else local
        whole = whole.transpose(0, 1).clone()  # [b, s, width]
        replacement = hook(whole.view(point.shape(config, *whole.shape[:2])))
        if replacement is None:
            return local
        flat = replacement.to(local).reshape(whole.shape).transpose(0, 1)
        return flat[..., rank * local.size(-1) : (rank + 1) * local.size(-1)].contiguous()

    return replace


def _attention_weights_hook(collectives: Collectives, hook: Hook) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def compute_and_show(module: Any, inputs: tuple[Any, ...]) -> None:
        query, key = inputs[:2]
        weights = attention_weights(query, key, module.softmax_scale)  # [b, heads of this rank, s, s]
        whole = collectives.all_gather(weights.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        hook(whole)

    return compute_and_show


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) of causal attention, with the softmax in float32. [s, b, n, d] twice -> [b, n, s, s]"""
    q, k = ((tensor.permute(1, 2, 0, 3)) for tensor in (query * scale, key))  # [b, n, s, d]
    scores = (q @ k.transpose(-1, -2)).float()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(query.dtype)
