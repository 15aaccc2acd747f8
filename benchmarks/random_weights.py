"""Hugging Face checkpoints of random weights, of any shape, whose greedy text wanders: every parameter matters."""

from __future__ import annotations

import json
from pathlib import Path

from opt_megatron.checkpoint.parameter_mapping import canonical_shapes
from opt_megatron.config import OPTConfig

_SEED = 1234


def save_random(config: OPTConfig, directory: Path, *, device: str = "cpu") -> None:
    """Write config.json and model.safetensors, in the config's dtype.

    Args:
        directory: is there, and empty.
        device: that draws the numbers; each gives other ones.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(_SEED)
    dtype = getattr(torch, config.dtype)
    tensors = {}
    for name, shape in canonical_shapes(config).items():
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * _scale(name, shape)
        if name.endswith("layer_norm.weight"):
            values += 1
        if name.endswith("embed_tokens.weight"):
            # Rows after the tokenizer's last id are padding: this project never chooses them, and with these weights
            # no other system does, since the best of fifty thousand logits is far above 0.
            values[config.num_tokens :] = 0
        tensors[name] = values.to(dtype).cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2))


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation: of matrices twice what keeps the size of a vector, so that layers outweigh the input."""
    if "embed_tokens" in name:
        return 0.05
    if "embed_positions" in name:
        return 0.5
    if len(shape) == 2:
        return 2 / shape[1] ** 0.5
    return 0.03 if "norm" in name else 0.2
