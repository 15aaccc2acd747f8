"""Passes over whole sequences whose results are whole tensors on every rank: logits, hidden states, attention maps.

The pass is the model's ordinary one (`full_forward.py`). Hooks that act on it are attached here, and errors
that a hook raises on one rank are raised on all of them after the pass.

b = sequences, s = tokens, H = hidden_size, V = vocab_size. Every method is called on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from ..parallel.context import ParallelContext
from .full_forward import stage_forward
from .hook_points import EMBEDDING, OUTPUT, Hook, attach_hook, parse_hook_point
from .opt_model import OPTModel


class Inspector:
    """Looks into a model on any layout.

    Args:
        model: this rank's part.
    """

    def __init__(self, model: OPTModel, parallel: ParallelContext) -> None:
        self._model = model
        self._config = model.opt_config
        self._parallel = parallel
        self._last_stage = parallel.pipeline_model_parallel_size - 1
        self._active_hooks = 0
        self._hook_errors: list[Exception] = []  # of the running pass

    @property
    def has_hooks(self) -> bool:
        """Whether a block of `hooks` is open."""
        return self._active_hooks > 0

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[b, s, V] for ids [b, s] on the model's device."""
        return self._head(self._forward(ids), ids.shape)

    def hidden_states(self, ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Hidden states [b, s, H] by transformers' numbers: 0 the embedding, num_layers the head's input."""
        last = self._config.num_layers
        names = [EMBEDDING, *(f"layers.{number}" for number in range(last - 1)), OUTPUT]
        found = self.capture(ids, {names[number] for number in layers})
        if self._config.has_embedding_projection and OUTPUT in found:
            found[OUTPUT] = self._projected(found[OUTPUT])
        return tuple(found[names[number]] for number in layers)

    def attentions(self, ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Attention maps [b, heads, s, s] of the layers."""
        found = self.capture(ids, {f"layers.{number}.attention.weights" for number in layers})
        return tuple(found[f"layers.{number}.attention.weights"] for number in layers)

    @torch.no_grad()
    def capture(self, ids: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors at the named hook points of one pass.

        Raises:
            UserError: there is no such hook point.
        """
        names = sorted({names} if isinstance(names, str) else set(names))  # in one order on all ranks
        found: dict[str, Tensor] = {}
        with self.hooks({name: _keep(found, name) for name in names}):
            self._forward(ids)
        for name in names:
            point = parse_hook_point(name, self._config)
            stage = point.stage(self._config, self._parallel.pipeline_model_parallel_size)
            found[name] = self._share(found.get(name), point.shape(self._config, *ids.shape), stage)
        return found

    @contextmanager
    def hooks(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within the block, call hooks at the named hook points of every pass.

        Raises:
            UserError: there is no such hook point, or a hook is not a function.
        """
        for name, hook in hooks.items():
            if not callable(hook):
                raise UserError(f"the hook at {name} must be a function, not {type(hook).__name__}")
        points = {name: parse_hook_point(name, self._config) for name in hooks}
        handles = [
            attach_hook(self._model, self._parallel, point, hooks[name], self._hook_errors)
            for name, point in points.items()
        ]
        if not self._active_hooks:
            self._hook_errors.clear()  # left by a pass that was interrupted
        self._active_hooks += 1
        try:
            yield
        finally:
            self._active_hooks -= 1
            for handle in handles:
                if handle is not None:
                    handle.remove()

    @torch.no_grad()
    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, V] of hidden states [b, s, H], through the final norm, where there is one, and the head."""
        local = None
        if self._parallel.is_last_stage:
            local = hidden.to(device=self._parallel.device, dtype=self._model.params_dtype).transpose(0, 1)
            norm = self._model.decoder.final_layernorm
            local = local if norm is None else norm(local)
        return self._head(local, hidden.shape[:2])

    def raise_hook_errors(self) -> None:
        """After a pass with hooks: raise what a hook raised, and on the other ranks a UserError that names it."""
        if not self._active_hooks:
            return
        errors = self._hook_errors.copy()
        self._hook_errors.clear()
        own = None
        if errors:
            known = isinstance(errors[0], UserError)
            own = str(errors[0]) if known else f"a hook raised {type(errors[0]).__name__}: {errors[0]}"
        messages = self._parallel.gather_objects(own)
        if errors:
            raise errors[0]
        message = next((message for message in messages if message is not None), None)
        if message is not None:
            raise UserError(message)

    def _forward(self, ids: Tensor) -> Tensor:
        hidden = stage_forward(self._model, self._parallel, ids)
        self.raise_hook_errors()
        return hidden

    def _head(self, hidden: Tensor | None, size: Sequence[int]) -> Tensor:
        """[s, b, H] on the last stage -> [b, s, V] on every rank."""
        logits = None
        if self._parallel.is_last_stage:
            weight = self._model.shared_embedding_or_output_weight()
            logits, _ = self._model.output_layer(hidden, weight=weight, runtime_gather_output=True)
            logits = logits.transpose(0, 1)
        return self._share(logits, (*size, self._config.vocab_size), self._last_stage)

    @torch.no_grad()
    def _projected(self, output: Tensor) -> Tensor:
        """350m: [b, s, H] -> [b, s, W], the embedding's width."""
        local = None
        if self._parallel.is_last_stage:
            local = self._model.get_submodule("output_layer.project_out")(output)
        return self._share(local, (*output.shape[:2], self._config.word_embed_proj_dim), self._last_stage)

    def _share(self, tensor: Tensor | None, shape: tuple[int, ...], stage: int) -> Tensor:
        """A tensor that the ranks of one stage have, on every rank."""
        if tensor is None:  # of another stage
            tensor = torch.empty(shape, dtype=self._model.params_dtype, device=self._parallel.device)
        if self._parallel.pipeline_model_parallel_size == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=stage * self._parallel.pipeline_stride)
        return tensor


def _keep(found: dict[str, Tensor], name: str) -> Hook:
    def keep(tensor: Tensor) -> None:
        found[name] = tensor

    return keep
