"""The requests that every system gets: prompts, output lengths and arrival times, as pure functions of a seed.

In a round every system runs once. Each round has other token ids, the same for all systems, so that none can
answer from a cache; the lengths are the same in all rounds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError

WORKLOADS = ("prefill", "decode", "context", "mixed", "poisson", "memory", "tensor_parallel", "training")

PromptTokens = tuple[int, ...]  # token ids


@dataclass(frozen=True)
class WorkloadRequest:
    """One request of the mixed workload: token ids, and the number of new ones to generate."""

    prompt: PromptTokens
    new_tokens: int


@dataclass(frozen=True)
class WorkloadSizes:
    """How large each workload is.

    Attributes:
        prefill: (rows, tokens a row) of each measured prompt.
        decode_batches: rows; each decodes `decode_steps` tokens after a prompt of `decode_prompt`.
        contexts: tokens of the prompt, one row; each decodes `context_steps` tokens after it.
        requests: of the mixed workload, with prompts and outputs of `prompt_range` and `output_range` tokens,
            both ends included.
        equality: (rows, tokens a row, new tokens) of the check that all systems generate the same tokens.
        memory: the same three of the run whose peak memory is measured.
        training: (rows, tokens a row) of a training step.
    """

    prefill: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (4, 512))
    decode_batches: tuple[int, ...] = (1, 4, 16)
    decode_prompt: int = 64
    decode_steps: int = 32
    contexts: tuple[int, ...] = (64, 512, 1024, 2000)
    context_steps: int = 16
    requests: int = 64
    prompt_range: tuple[int, int] = (16, 512)
    output_range: tuple[int, int] = (16, 256)
    equality: tuple[int, int, int] = (4, 64, 32)
    memory: tuple[int, int, int] = (4, 512, 32)
    training: tuple[int, int] = (4, 512)

    def check_fits(self, config: OPTConfig, name: str) -> None:
        """Raise UserError unless the model has enough positions for the longest request."""
        longest = max(
            max(tokens for _, tokens in self.prefill) + 1,
            self.decode_prompt + self.decode_steps + 1,
            max(self.contexts) + self.context_steps + 1,
            self.prompt_range[1] + self.output_range[1],
            sum(self.equality[1:]),
            sum(self.memory[1:]),
            self.training[1],
        )
        if longest > config.max_position_embeddings:
            raise UserError(
                f"{name} has {config.max_position_embeddings} positions, but the workloads need {longest}: "
                "measure a model with more"
            )


QUICK = WorkloadSizes(
    prefill=((1, 128), (1, 512)),
    decode_steps=16,
    contexts=(64, 512),
    context_steps=8,
    requests=16,
    prompt_range=(16, 128),
    output_range=(16, 64),
    training=(2, 128),
)


def make_prompts(config: OPTConfig, rows: int, tokens: int, seed: int, label: str = "") -> list[PromptTokens]:
    """`rows` prompts of `tokens` ids each: BOS, then ids drawn uniformly from those of text."""
    rng = random.Random(f"prompts {seed} {label}")
    return [_prompt(config, tokens, rng) for _ in range(rows)]


def make_requests(config: OPTConfig, sizes: WorkloadSizes, seed: int, label: str = "") -> list[WorkloadRequest]:
    """The requests of the mixed workload, lengths drawn uniformly from the ranges of `sizes`, in no order."""
    lengths, rng = random.Random(f"lengths {seed}"), random.Random(f"requests {seed} {label}")
    return [
        WorkloadRequest(
            _prompt(config, lengths.randint(*sizes.prompt_range), rng), lengths.randint(*sizes.output_range)
        )
        for _ in range(sizes.requests)
    ]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds, ascending: exponential gaps of mean 1 / `rate`, the first request at 0."""
    rng = random.Random(f"arrivals {seed}")
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:count]


def _prompt(config: OPTConfig, tokens: int, rng: random.Random) -> PromptTokens:
    # 0 to 3 are the special tokens of every OPT (BOS, padding, EOS, unknown), which no text contains.
    return (config.bos_token_id, *(rng.randrange(4, config.num_tokens) for _ in range(tokens - 1)))
