"""All that a user can ask of generation, scoring and inspection, once: on the GPU the values that the CPU gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt_megatron import OPT
from opt_megatron.generation.core.engine import Engine
from opt_megatron.model.scoring import Item
from opt_megatron.parallel.context import ParallelContext

from ...workload import PromptTokens, make_prompts
from .. import models
from ..case import Case, attempt
from ..settings import Settings

_SAMPLED = {"temperature": 0.8, "seed": 1}
_GENERATION: dict[str, dict[str, Any]] = {
    "greedy, logprobs, echo": {"temperature": 0, "logprobs": 3, "echo": True},
    "temperature": _SAMPLED,
    "top-k, top-p, min-p": {**_SAMPLED, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "typical-p": {**_SAMPLED, "typical_p": 0.9},
    "penalties": {**_SAMPLED, "repetition_penalty": 1.2, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    "logit bias, banned tokens": {**_SAMPLED, "logit_bias": {5: 1.0}, "banned_tokens": (7,)},
    "n and best of": {"temperature": 1.0, "seed": 1, "n": 2, "best_of": 3},
    "beams": {"num_beams": 3, "temperature": 0},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
}
_TOKENS = 16
_DRAFT_NOISE = 0.03  # of the draft model's weights: some of its proposals are rejected, not all


def values(settings: Settings) -> Iterator[Case]:
    """Each feature's numbers (`values`: ids, log-probabilities, activations), in float32 with the embedded model."""
    parallel = models.start(settings)
    directory = models.trained_checkpoint(settings)
    model, draft, inspected = (models.load(directory, parallel, "float32") for _ in range(3))
    _add_noise(draft)
    prompts = make_prompts(model.opt_config, 3, 40, seed=1)
    engine = Engine(model, parallel)
    for name, options in _GENERATION.items():
        yield _case(name, partial(_generated, engine, prompts, options))
    drafts = {
        "prompt lookup": partial(Engine, model, parallel, prompt_lookup=True),
        "draft model": partial(Engine, model, parallel, draft_model=draft),
    }
    for name, make_engine in drafts.items():
        for kind, options in (("greedy", {"temperature": 0}), ("sampled", _SAMPLED)):
            yield _case(f"{name}, {kind}", partial(_speculated, make_engine, prompts, options))
    opt = OPT.from_model(inspected, parallel)
    yield _case("score", partial(_scores, opt, prompts))
    yield _case("hidden states and attention maps", partial(_inside, opt, prompts))
    yield _case("hooks", partial(_hooked, opt, prompts))
    for dtype in ("float16", "bfloat16"):
        yield attempt(f"all of generation in {dtype}", partial(_in_half_precision, parallel, directory, prompts, dtype))


def _case(name: str, compute: Callable[[], list[float]]) -> Case:
    return attempt(name, lambda: (None, {"values": compute()}))


def _add_noise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * _DRAFT_NOISE
            parameter.add_(noise.to(parameter.device))


def _generated(engine: Engine, prompts: Sequence[PromptTokens], options: dict[str, Any]) -> list[float]:
    completions = models.complete(engine, prompts, _TOKENS, **options)
    tokens = [token for completion in completions for token in completion.tokens]
    return [*tokens, *(logprob for completion in completions for logprob in completion.logprobs if logprob is not None)]


def _speculated(
    make_engine: Callable[[], Engine], prompts: Sequence[PromptTokens], options: dict[str, Any]
) -> list[float]:
    return _generated(make_engine(), prompts, options)


def _in_half_precision(
    parallel: ParallelContext, directory: Path, prompts: Sequence[PromptTokens], dtype: str
) -> tuple[bool, dict[str, Any]]:
    """That each kind ends with as many tokens as it should; which ones rounding decides."""
    engine = Engine(models.load(directory, parallel, dtype), parallel)
    short = [
        name
        for name, options in _GENERATION.items()
        if any(len(made.tokens) != _TOKENS for made in models.complete(engine, prompts, _TOKENS, **options))
    ]
    return not short, {"kinds": len(_GENERATION), "kinds without all tokens": short}


def _scores(opt: OPT, prompts: Sequence[PromptTokens]) -> list[float]:
    items = [Item(prompt[:5], prompt[5:]) for prompt in prompts]
    return [logprob for score in opt.score_items(items) for logprob in score.logprobs]


def _inside(opt: OPT, prompts: Sequence[PromptTokens]) -> list[float]:
    hidden, maps = opt.hidden_states([prompts[0]]), opt.attentions([prompts[0]])
    return [number for tensor in (*hidden, *maps) for number in _some(tensor)]


def _hooked(opt: OPT, prompts: Sequence[PromptTokens]) -> list[float]:
    with opt.hooks({"layers.1.mlp": torch.zeros_like, "layers.0.attention.heads": lambda heads: heads * 0.5}):
        return _some(opt.logits([prompts[0]]))


def _some(tensor: Tensor) -> list[float]:
    """Its last numbers."""
    return tensor.flatten()[-8:].tolist()
