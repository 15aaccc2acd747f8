"""Logits, log-probabilities and greedy tokens against OPT in plain torch, and against transformers where it is there.

The truth is plain torch's float32. In half precision every program rounds in another order: this one's error may be
twice plain torch's in the same dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Completion
from opt_megatron.parallel.context import ParallelContext

from ...workload import PromptTokens, make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..plain_opt import PlainOPT
from ..settings import SMALL, Settings

_ROWS, _CHUNK = 4, 100  # prompts; tokens of a step that reads them
_FLOAT32_ERROR = 2e-5  # relative, of logits; log-probabilities differ by less than 1e-4
_FLOAT32_LOGPROB_ERROR = 1e-4


def cases(settings: Settings) -> Iterator[Case]:
    """Each dtype of the embedded model, and of random weights of 125m's shape."""
    parallel = models.start(settings)
    checkpoints = {} if settings.is_tiny else {"story": EMBEDDED_DIRECTORY}
    for name, directory in (checkpoints | {SMALL: models.make_checkpoint(settings, SMALL)}).items():
        for dtype in models.DTYPES:
            yield attempt(f"{name} {dtype}", partial(_parity, settings, parallel, directory, dtype))


def _parity(settings: Settings, parallel: ParallelContext, directory: Path, dtype: str) -> tuple[bool, Figures]:
    exact = PlainOPT(directory, settings.device, torch.float32)
    plain = PlainOPT(directory, settings.device, getattr(torch, dtype))
    length, count = (40, 8) if settings.is_tiny else (300, 48)
    prompts = make_prompts(exact.config, _ROWS, models.fitting_length(exact.config, length, count), seed=1)
    model = models.load(directory, parallel, dtype)
    num_tokens, inputs = exact.config.num_tokens, torch.tensor(prompts, device=settings.device)
    with torch.inference_mode():
        truth, peer, own = (logits(inputs)[..., :num_tokens].float() for logits in (exact.logits, plain.logits, model))
        errors = {"logits": _relative(own, truth), "plain torch's logits": _relative(peer, truth)}
        if models.has_transformers():
            theirs = models.transformers_model(directory, settings.device, dtype)
            errors["transformers' logits"] = _relative(theirs(inputs).logits[..., :num_tokens].float(), truth)
        engine = Engine(model, parallel, prefill_chunk_size=_CHUNK)
        completions = models.complete(engine, prompts, count, temperature=0, logprobs=0, prompt_logprobs=0)
        errors |= _cached_errors(completions, exact, plain, prompts)
        wanted = exact.greedy(prompts, count)
    pairs = zip(models.tokens_of(completions), wanted, strict=True)
    agreeing = sum(_agreeing(own, other) for own, other in pairs) / (count * len(prompts))
    logits_bound = max(2 * errors["plain torch's logits"], _FLOAT32_ERROR)
    logprobs_bound = max(2 * errors["plain torch's log-probabilities"], _FLOAT32_LOGPROB_ERROR)
    passed = errors["logits"] <= logits_bound and errors["log-probabilities"] <= logprobs_bound
    passed &= dtype != "float32" or agreeing == 1
    return passed, {"error of": errors, "greedy tokens that agree with plain torch's float32": agreeing}


def _cached_errors(
    completions: Sequence[Completion], exact: PlainOPT, plain: PlainOPT, prompts: Sequence[PromptTokens]
) -> dict[str, float]:
    """Through the KV cache: the largest errors of log-probabilities of prompts and of what is generated."""
    texts = [(*prompt, *made.tokens) for prompt, made in zip(prompts, completions, strict=True)]
    truth, peer = (_log_probabilities(one, texts) for one in (exact, plain))
    own = torch.tensor(
        [[*(event.logprob for event in one.prompt_events[1:]), *one.logprobs] for one in completions],
        device=truth.device,
    )
    return {
        "log-probabilities": float((own - truth).abs().max()),
        "plain torch's log-probabilities": float((peer - truth).abs().max()),
    }


def _log_probabilities(model: PlainOPT, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Of every token after the first, [b, s - 1], by one pass without a cache."""
    tokens = torch.tensor(texts, device=model.weights["embed_tokens.weight"].device)
    logits = model.logits(tokens)[:, :-1, : model.config.num_tokens].float()
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True)))


def _relative(value: Tensor, truth: Tensor) -> float:
    """The error in the Euclidean norm."""
    return float((value - truth).norm() / truth.norm())
