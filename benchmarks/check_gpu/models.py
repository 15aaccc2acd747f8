"""Models, prompts and tokens for the sections; used in their processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Completion, Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.model.opt_model import OPTModel
from opt_megatron.parallel.context import ParallelContext, init_parallel

from ..weights import make_huggingface
from ..workload import PromptTokens
from .settings import SMALL, Settings

DTYPES = ("float32", "float16", "bfloat16")


def start(settings: Settings) -> ParallelContext:
    """This process alone, on the device."""
    torch.set_num_threads(settings.threads)
    return init_parallel(1, 1, seed=1234, device=settings.device)


def make_checkpoint(settings: Settings, size: str) -> Path:
    """The Hugging Face directory of the random model of a size, in float16; made if it is not there yet."""
    config = settings.config(size).replace(dtype="float16")
    return make_huggingface(settings.checkpoint(size), config, device=settings.device)


def trained_checkpoint(settings: Settings) -> Path:
    """The embedded model's; with toy sizes that of a random one, which takes less time."""
    return make_checkpoint(settings, SMALL) if settings.is_tiny else EMBEDDED_DIRECTORY


def load(directory: Path, parallel: ParallelContext, dtype: str, quantization: str | None = None) -> OPTModel:
    """This project's model of a checkpoint."""
    return load_model(directory, None, parallel, dtype, quantization=quantization)


def has_transformers() -> bool:
    """Whether it is installed, and can be compared with."""
    return importlib.util.find_spec("transformers") is not None


def transformers_model(directory: Path, device: str, dtype: str) -> Any:
    """transformers' model of a checkpoint, without dropout."""
    from transformers import OPTForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = OPTForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def complete(engine: Engine, prompts: Sequence[PromptTokens], count: int, **options: Any) -> list[Completion]:
    """`count` tokens after each prompt; an end of sequence is a token like others."""
    params = SamplingParams(**{"max_new_tokens": count, "ignore_eos": True, **options})
    return engine.complete([Request(prompt, params) for prompt in prompts])


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    """Their ids."""
    return [completion.tokens for completion in completions]


def fitting_length(config: OPTConfig, wanted: int, new_tokens: int) -> int:
    """Of a prompt, at most `wanted` tokens."""
    return min(wanted, config.max_position_embeddings - new_tokens)
