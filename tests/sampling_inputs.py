"""Inputs of the tests of sampling, and its functions called with options instead of a processor chain."""

import math

import torch

from opt_megatron.generation.sampling.logits_processors import ProcessorChain
from opt_megatron.generation.sampling.random_numbers import RandomNumbers
from opt_megatron.generation.sampling.sampler import SamplerState, choose_token, distribution, filtered_scores
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.sampling.token_history import TokenHistory

PROMPT = (3, 5, 5, 7)
EOS = 2
NEVER = -math.inf


def history(*output: int, prompt: tuple[int, ...] = PROMPT, eos: int | None = EOS) -> TokenHistory:
    result = TokenHistory(prompt, () if eos is None else (eos,))
    for token in output:
        result.append(token)
    return result


def scores(seed: int = 0, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filtered(logits: torch.Tensor, params: SamplingParams, known: TokenHistory) -> torch.Tensor:
    return filtered_scores(logits, ProcessorChain(params), known)


def probabilities(logits: torch.Tensor, params: SamplingParams, known: TokenHistory) -> torch.Tensor:
    return distribution(logits, ProcessorChain(params), known)


def choose(logits: torch.Tensor, params: SamplingParams, known: TokenHistory, seed: int = 0) -> int:
    return choose_token(logits, SamplerState(ProcessorChain(params), known, RandomNumbers(seed)))
