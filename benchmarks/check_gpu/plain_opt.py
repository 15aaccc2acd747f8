"""OPT in plain torch, as transformers computes it (modeling_opt.py, with torch's attention), without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from opt_megatron.checkpoint.parameter_mapping import PREFIX
from opt_megatron.config import OPTConfig

_POSITION_OFFSET = 2  # the position table's first rows belong to no position


class PlainOPT:
    """A model that reads a Hugging Face directory.

    Shapes: b = sequences, s = tokens, V = vocabulary.

    Attributes:
        weights: by their names in the file.
    """

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        from safetensors.torch import load_file

        self.config = OPTConfig.from_directory(directory)
        self._device = device
        self.weights = {
            name.removeprefix(PREFIX): tensor.to(device, dtype)
            for path in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def logits(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, V]"""
        weights, config = self.weights, self.config
        x = functional.embedding(tokens, weights["embed_tokens.weight"])
        if config.has_embedding_projection:
            x = functional.linear(x, weights["project_in.weight"])
        positions = torch.arange(tokens.size(1), device=tokens.device) + _POSITION_OFFSET
        x = x + functional.embedding(positions, weights["embed_positions.weight"])
        for layer in range(config.num_layers):
            x = self._layer(f"layers.{layer}.", x)
        if config.has_final_layer_norm:
            x = self._norm("final_layer_norm", x)
        if config.has_embedding_projection:
            x = functional.linear(x, weights["project_out.weight"])
        return functional.linear(x, weights["embed_tokens.weight"])

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
        """The likeliest `count` tokens after prompts of one length; an end of sequence is a token like others."""
        tokens = torch.tensor(prompts, device=self._device)
        for _ in range(count):
            last = self.logits(tokens)[:, -1, : self.config.num_tokens]
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
        return [tuple(row) for row in tokens[:, len(prompts[0]) :].tolist()]

    def loss(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The mean cross-entropy of [b, s + 1] ids: each is predicted from those before it."""
        tokens = torch.tensor(rows, device=self._device)
        logits = self.logits(tokens[:, :-1]).flatten(0, 1).float()
        return functional.cross_entropy(logits, tokens[:, 1:].flatten())

    def _layer(self, prefix: str, x: Tensor) -> Tensor:
        is_pre_norm = self.config.do_layer_norm_before
        for norm, block in (("self_attn_layer_norm", self._attention), ("final_layer_norm", self._mlp)):
            inputs = self._norm(prefix + norm, x) if is_pre_norm else x
            x = x + block(prefix, inputs)
            x = x if is_pre_norm else self._norm(prefix + norm, x)
        return x

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        def heads(name: str) -> Tensor:
            return self._linear(f"{prefix}self_attn.{name}", x)

        num_heads = self.config.num_attention_heads
        head_dim = self.config.hidden_size // num_heads
        query, key, value = (
            projected.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)  # [b, n, s, d]
            for projected in (heads("q_proj") * head_dim**-0.5, heads("k_proj"), heads("v_proj"))
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self._linear(f"{prefix}self_attn.out_proj", attended.transpose(1, 2).flatten(2))

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        return self._linear(f"{prefix}fc2", functional.relu(self._linear(f"{prefix}fc1", x)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, (self.config.hidden_size,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )
