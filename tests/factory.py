"""Small random OPT models, made by transformers, whose every parameter matters to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import OPTConfig as HFConfig
from transformers import OPTForCausalLM

# Divisible by tensor parallel 1, 2, 3, 4 and 6 (12 heads, 516 = 4 * 3 * 43 rows) and by 1, 2, 3, 4 stages.
SMALL = {
    "vocab_size": 516,
    "hidden_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 96,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
OPT_125M = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
}


def random_model(seed: int = 0, scale: float = 0.12, **overrides: object) -> OPTForCausalLM:
    """A model with random biases and norms too, in float32; SMALL with `overrides`.

    Args:
        scale: standard deviation of the parameters; the default spreads the logits of a narrow model.
    """
    values = SMALL | overrides
    values.setdefault("word_embed_proj_dim", values["hidden_size"])
    torch.manual_seed(seed)
    model = OPTForCausalLM(HFConfig(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(noise + 1 if name.endswith("layer_norm.weight") else noise)
    return model


def save(model: OPTForCausalLM, directory: Path) -> Path:
    """Write it as a Hugging Face directory."""
    model.save_pretrained(directory)
    return directory


def divides(model: OPTForCausalLM, tp: int, pp: int = 1) -> bool:
    """Whether the model can be divided among tensor parallel ranks and stages."""
    return model.config.num_attention_heads % tp == 0 and model.config.num_hidden_layers % pp == 0


def prompts_for(model: OPTForCausalLM, lengths: Sequence[int] = (5, 31, 1, 17, 9, 2, 25, 12)) -> list[tuple[int, ...]]:
    """Random ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(11)
    size = model.config.vocab_size
    return [tuple(torch.randint(4, min(size, 500), (n,), generator=generator).tolist()) for n in lengths]


def oracle_greedy(model: OPTForCausalLM, prompt: list[int], new_tokens: int) -> tuple[int, ...]:
    """transformers' greedy continuation, not stopping at the end-of-sequence token."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    return tuple(ids[0, len(prompt) :].tolist())
