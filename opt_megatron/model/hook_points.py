"""The places in a model that can be looked at and changed, by name, and their tensors made whole.

    embedding                      [b, s, H]      token embeddings with positions: what the first layer reads
    layers.N                       [b, s, H]      the residual stream behind layer N (from 0)
    layers.N.attention             [b, s, H]      what attention adds to it
    layers.N.attention.heads       [b, s, n, d]   what each head gives to the output projection
    layers.N.attention.weights     [b, n, s, s]   where each head looks (to be read only)
    layers.N.mlp                   [b, s, H]      what the MLP adds
    layers.N.mlp.neurons           [b, s, F]      the MLP's neurons, behind ReLU
    output                         [b, s, H]      behind the last layer and, where there is one, the final norm

A hook gets a copy of its own: it may keep it and write into it, and only what it returns reaches the model.

b = sequences, s = tokens, H = hidden_size, n = attention heads, d = head_dim, F = ffn_hidden_size. A rank holds
its part of the heads and the neurons; the others' parts are gathered for a look, and a replacement is cut again.
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

# Sees a copy of the whole tensor of a place; what it returns, unless that is None, takes the tensor's place.
Hook = Callable[[Tensor], Tensor | None]

EMBEDDING, OUTPUT = "embedding", "output"
LAYER, ATTENTION, HEADS, WEIGHTS, MLP, NEURONS = (
    "",
    "attention",
    "attention.heads",
    "attention.weights",
    "mlp",
    "mlp.neurons",
)
_NAME = re.compile(r"layers\.(\d+)(?:\.([a-z.]+))?")


@dataclass(frozen=True)
class Place:
    """A parsed name. `part` is one of the constants above; `layer` is None outside the layers."""

    name: str
    part: str
    layer: int | None

    def shape(self, config: OPTConfig, batch: int, tokens: int) -> tuple[int, ...]:
        """Of the whole tensor."""
        heads = config.num_attention_heads
        if self.part == HEADS:
            return batch, tokens, heads, config.head_dim
        if self.part == WEIGHTS:
            return batch, heads, tokens, tokens
        return batch, tokens, config.ffn_hidden_size if self.part == NEURONS else config.hidden_size

    def stage(self, config: OPTConfig, stages: int) -> int:
        """The pipeline stage that has it."""
        if self.layer is None:
            return 0 if self.part == EMBEDDING else stages - 1
        return self.layer // (config.num_layers // stages)


def parse(name: str, config: OPTConfig) -> Place:
    """The place of a name.

    Raises:
        UserError: the model has no such place.
    """
    if name in (EMBEDDING, OUTPUT):
        return Place(name, name, None)
    match = _NAME.fullmatch(name)
    parts = (LAYER, ATTENTION, HEADS, WEIGHTS, MLP, NEURONS)
    if match is None or (match[2] or "") not in parts:
        endings = ", ".join(f"layers.N.{part}" for part in parts[1:])
        raise UserError(f"{name!r} is no place in the model; there are {EMBEDDING}, {OUTPUT}, layers.N, {endings}")
    if int(match[1]) >= config.num_layers:
        raise UserError(f"{name!r}: the model's {config.num_layers} layers are counted from 0")
    return Place(name, match[2] or "", int(match[1]))


def attach(
    model: OPTModel, parallel: ParallelContext, place: Place, hook: Hook, errors: list[Exception]
) -> RemovableHandle | None:
    """Call the hook whenever the model's ordinary forward pass comes to the place; None where it is not this stage's.

    Called on every rank. The hook runs on all tensor parallel ranks of the stage with the same tensor, and must
    return the same on each.

    Args:
        errors: gets what the hook raises, or what is wrong with its result. The pass goes on with the tensor as it
            was: were it left here, other ranks would wait for this one's part of it.
    """
    collectives = tensor_parallel_collectives(parallel)
    if place.stage(model.opt_config, parallel.pipeline_model_parallel_size) != parallel.pipeline_model_parallel_rank:
        return None
    module, is_input = _module(model, place)

    def see(shown: Tensor) -> Tensor | None:
        try:
            replacement = hook(shown)
            _check(place, shown, replacement)
        except Exception as error:
            errors.append(error)
            return None
        return replacement

    if place.part == WEIGHTS:
        return module.register_forward_pre_hook(_watch_weights(collectives, see))
    change = _changer(place, model.opt_config, parallel, collectives, see)
    if is_input:
        return module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _, inputs, output: _with_first(output, change))


def _module(model: OPTModel, place: Place) -> tuple[nn.Module, bool]:
    """The module whose output the place is, or whose first input."""
    if place.layer is None:
        return (model.embedding if place.part == EMBEDDING else model.decoder), False
    layer = next(layer for layer in model.decoder.layers if layer.layer_number == place.layer + 1)
    return {
        LAYER: (layer, False),
        ATTENTION: (layer.self_attention, False),
        HEADS: (layer.self_attention.core_attention, False),
        WEIGHTS: (layer.self_attention.core_attention, True),
        MLP: (layer.mlp, False),
        NEURONS: (layer.mlp.linear_fc2, True),
    }[place.part]


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Core's modules return a tensor, or it and something else (a bias, a context)."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _changer(
    place: Place, config: OPTConfig, parallel: ParallelContext, collectives: Collectives, see: Hook
) -> Callable[[Tensor], Tensor]:
    """From the module's tensor [s, b, width on this rank] to what takes its place."""
    is_divided = place.part in (HEADS, NEURONS)
    rank = parallel.tensor_model_parallel_rank if is_divided else 0

    def change(local: Tensor) -> Tensor:
        # A copy, since core writes on where some of these lie (it adds the residual stream in place).
        whole = collectives.all_gather(local) if is_divided else local
        whole = whole.transpose(0, 1).clone()  # [b, s, width]
        shown = whole.unflatten(-1, (-1, config.head_dim)) if place.part == HEADS else whole
        replacement = see(shown)
        if replacement is None:
            return local
        flat = replacement.to(local).reshape(whole.shape).transpose(0, 1)
        return flat[..., rank * local.size(-1) : (rank + 1) * local.size(-1)].contiguous()

    return change


def _check(place: Place, shown: Tensor, replacement: Any) -> None:
    if replacement is None:
        return
    if place.part == WEIGHTS:
        raise UserError(f"{place.name} can be read only: its hook must return None (change attention.heads)")
    if not isinstance(replacement, Tensor) or replacement.shape != shown.shape:
        got = tuple(replacement.shape) if isinstance(replacement, Tensor) else type(replacement).__name__
        raise UserError(f"the hook at {place.name} returned {got}, but must return {tuple(shown.shape)} or None")


def _watch_weights(collectives: Collectives, see: Hook) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weights = attention_weights(*inputs[:2], module.softmax_scale)  # [b, heads of this rank, s, s]
        whole = collectives.all_gather(weights.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        see(whole)

    return watch


def attention_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) of causal attention, with the softmax in float32. [s, b, n, d] twice -> [b, n, s, s]"""
    q, k = ((tensor.permute(1, 2, 0, 3)) for tensor in (query * scale, key))  # [b, n, s, d]
    scores = (q @ k.transpose(-1, -2)).float()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(query.dtype)
