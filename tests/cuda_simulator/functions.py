"""Functions of torch that do not arrive as plain operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from . import graphs
from .tensors import CudaTensor, held, is_cuda, pin
from .traffic import DeviceMismatch, launch, refuse


class Functions(TorchFunctionMode):
    """`torch.tensor` of CUDA scalars, and pinned memory."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], (list, tuple)):
            args = (_numbers(args[0]), *args[1:])
        if kwargs.get("pin_memory"):
            return pin(function(*args, **{**kwargs, "pin_memory": False}))
        return function(*args, **kwargs)


def _numbers(data: Any) -> Any:
    """A nested list with each CUDA scalar read, one at a time, as torch.tensor does."""
    if isinstance(data, (list, tuple)):
        return [_numbers(element) for element in data]
    return data.item() if is_cuda(data) and data.dim() == 0 else data


def attention_in_one_launch(original: Callable) -> Callable:
    """Without gradients attention is one kernel, not the CPU kernel's parts."""

    @functools.wraps(original)
    def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
        if not any(map(is_cuda, tensors)) or (torch.is_grad_enabled() and query.requires_grad):
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if not all(map(is_cuda, tensors)):
            refuse(DeviceMismatch, "scaled_dot_product_attention: tensors on two devices")
        launch("attention" if attn_mask is None else "attention with a mask")
        inputs = *map(held, (query, key, value, attn_mask)), dropout_p, is_causal
        with no_dispatch():  # or the parts would count as work of the host
            return CudaTensor(graphs.run(original, inputs, options, written=[]))

    return scaled_dot_product_attention
