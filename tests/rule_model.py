"""A language model that is a rule instead of weights, used instead of the engine's runner.

The logits follow from all tokens so far, as the cache holds them: whoever writes, copies or reads the cache at a
wrong place gets other tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.sampling.batch_sampler import GREEDY, SamplingRow, SamplingTensors, sample_rows
from opt_megatron.generation.sampling.logits_processors import NO_IDS, ProcessorChain
from opt_megatron.generation.sampling.random_numbers import RandomNumbers
from opt_megatron.generation.sampling.sampler import SamplerState, choose_token
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.sampling.token_history import TokenHistory
from opt_megatron.generation.step import NEWEST, KVCacheBlocks, OutputKind, StepInput, StepOutput, sampling_numbers

HIDDEN_SIZE = 6


class RuleModel:
    """A Runner (`generation/core/executor.py`).

    Args:
        vocabulary: tokens.
        seed: of the rule.
        blend: how much of the logits is another seed's rule; makes a draft that is like the model.
        keeps_tokens: of `Runner`.

    Attributes:
        steps: made so far; computed: tokens in all of them; sequences: of the largest.
    """

    def __init__(self, vocabulary: int, seed: int = 0, blend: float = 0.0, keeps_tokens: bool = False) -> None:
        self.vocabulary, self._seed, self._blend = vocabulary, seed, blend
        self.cells: list[int | None] = []
        self.keeps_tokens = keeps_tokens
        self._newest: dict[int, int] = {}  # token of each sequence's first cell
        self.steps = self.computed = self.sequences = 0
        self.logits = functools.cache(self._logits)

    def allocate(self, num_tokens: int) -> None:
        self.cells = [None] * max(num_tokens, len(self.cells))

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        assert 0 <= begin < end <= min(source.size, target.size)
        copied = self.cells[source.start + begin : source.start + end]
        self.cells[target.start + begin : target.start + end] = copied

    def forward(self, step: StepInput) -> StepOutput:
        assert step.sequences
        self.steps += 1
        self.sequences = max(self.sequences, len(step.sequences))
        chosen: list[int] = []
        rows: list[Tensor] = []
        for sequence in step.sequences:
            assert sequence.tokens and sequence.num_logits <= len(sequence.tokens)
            self.computed += len(sequence.tokens)
            start, end = sequence.blocks.start, sequence.position + len(sequence.tokens)
            assert end <= sequence.blocks.size
            known = [self._newest[start] if token == NEWEST else token for token in sequence.tokens]
            self.cells[start + sequence.position : start + end] = known
            for seen in range(end - sequence.num_logits + 1, end + 1):
                tokens = tuple(self.cells[start : start + seen])
                if sequence.sampling is None:
                    rows.append(self._row(tokens, step.output_kind))
                else:
                    chosen.append(self._choose(tokens, sequence.sampling))
                    self._newest[start] = chosen[-1]
        return StepOutput(torch.tensor(chosen, dtype=torch.int64), torch.stack(rows) if rows else torch.empty(0, 1))

    def _row(self, tokens: tuple[int, ...], kind: OutputKind) -> Tensor:
        logits = self.logits(tokens)
        return torch.cat((logits, self.hidden(tokens))) if kind is OutputKind.HIDDEN_STATES else logits

    def _choose(self, tokens: tuple[int, ...], row: SamplingRow) -> int:
        if row == GREEDY:
            return int(self.logits(tokens).argmax())
        options = SamplingTensors.of(torch.tensor(sampling_numbers(row))[:, None], self.vocabulary)
        numbers = options.numbers(torch.tensor([len(tokens)]))
        return int(sample_rows(self.logits(tokens)[None], options, numbers, NO_IDS))

    def _logits(self, tokens: tuple[int, ...]) -> Tensor:
        own = 2 * _noise(self.vocabulary, tokens, self._seed)
        return own + self._blend * _noise(self.vocabulary, tokens, self._seed + 1) if self._blend else own

    def hidden(self, tokens: tuple[int, ...]) -> Tensor:
        """The hidden state [H] of the last of `tokens`."""
        return _noise(HIDDEN_SIZE, tokens, self._seed + 2)

    def continued(self, prompt: Sequence[int], params: SamplingParams, choice: int = 0) -> tuple[int, ...]:
        """What the engine has to generate, one token after another and without a cache; never ends early."""
        history = TokenHistory(prompt)
        numbers = RandomNumbers(params.seed, choice)
        state = SamplerState(ProcessorChain(params), history, numbers)
        for _ in range(params.max_new_tokens):
            logits = self.logits(tuple(history.tokens))
            history.append(choose_token(logits, state))
        return tuple(history.output)

    def probability(self, prompt: Sequence[int], continuation: Sequence[int]) -> float:
        """Of a continuation, sampled without filters."""
        tokens, total = list(prompt), 0.0
        for token in continuation:
            total += float(self.logits(tuple(tokens)).log_softmax(-1)[token])
            tokens.append(token)
        return math.exp(total)


def rule_engine(engine: Engine, rule: RuleModel, draft: RuleModel | None = None) -> Engine:
    """Put rules in the places of the engine's models."""
    assert len(engine._runners) == (1 if draft is None else 2)
    engine._runners[:] = [rule] if draft is None else [rule, draft]
    engine._runs_ahead = rule.keeps_tokens and engine._draft is None
    return engine


def _noise(size: int, tokens: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(hash((seed, *tokens)) % 2**63))
