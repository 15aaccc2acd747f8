"""The tokens of one sequence, and the counts that penalties need of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from functools import cached_property

import torch
from torch import Tensor

TokenCounts = tuple[Tensor, Tensor]  # distinct ids [distinct] int64, and how often each occurs [distinct] int64


class _PromptCounts:
    """The counts of a prompt's tokens, made once for a history and all its copies."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = tokens

    @cached_property
    def counts(self) -> TokenCounts:
        return _as_tensors(Counter(self._tokens))

    @cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(self._tokens)


class TokenHistory:
    """The prompt and the output of one sequence, as logits processors see them.

    Tokens are counted when a processor asks for counts, so that a sequence without penalties only appends to a list.

    Args:
        prompt: ids, BOS included.
        eos: the end-of-sequence ids, which `min_new_tokens` masks; none where no such token ends the text.

    Attributes:
        tokens: ids of the prompt and the output. A new token may be appended to the list itself.
        num_prompt_tokens: how many of them are the prompt's.
        eos: as given.
    """

    def __init__(self, prompt: Sequence[int], eos: Sequence[int] = ()) -> None:
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(self.tokens)
        self.eos = eos
        self._prompt = _PromptCounts(tuple(prompt))
        self._output_counts: Counter[int] = Counter()
        self._num_counted = self.num_prompt_tokens

    @property
    def output(self) -> list[int]:
        """A copy of the output's ids."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens the output has."""
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token: int) -> None:
        """Add a token to the output."""
        self.tokens.append(token)

    def copy(self) -> TokenHistory:
        """An independent history with the same tokens; what was counted of the prompt is shared."""
        other = TokenHistory.__new__(TokenHistory)
        other.tokens, other.num_prompt_tokens, other.eos = self.tokens.copy(), self.num_prompt_tokens, self.eos
        other._prompt = self._prompt
        other._output_counts, other._num_counted = self._output_counts.copy(), self._num_counted
        return other

    def distinct(self) -> Tensor:
        """[distinct] int64: every id of the prompt and the output once."""
        new = [token for token in self._counted_output() if token not in self._prompt.ids]
        return torch.cat([self._prompt.counts[0], torch.tensor(new, dtype=torch.int64)])

    def output_counts(self) -> TokenCounts:
        """Distinct ids of the output, and how often each occurs there."""
        return _as_tensors(self._counted_output())

    def prompt_counts(self) -> TokenCounts:
        """Distinct ids of the prompt, and how often each occurs there."""
        return self._prompt.counts

    def tokens_since(self, ends: Container[int]) -> int:
        """How many tokens of the output follow the last one that is in `ends`; all if none is."""
        for count, index in enumerate(range(len(self.tokens) - 1, self.num_prompt_tokens - 1, -1)):
            if self.tokens[index] in ends:
                return count
        return self.num_output_tokens

    def _counted_output(self) -> Counter[int]:
        for token in self.tokens[self._num_counted :]:
            self._output_counts[token] += 1
        self._num_counted = len(self.tokens)
        return self._output_counts


def _as_tensors(counts: Counter[int]) -> TokenCounts:
    ids = torch.tensor([*counts], dtype=torch.int64)
    return ids, torch.tensor([*counts.values()], dtype=torch.int64)
