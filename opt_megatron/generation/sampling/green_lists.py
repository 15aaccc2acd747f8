"""Green lists: the ids that a watermark prefers after given tokens.

Kirchenbauer et al. 2023, "A Watermark for Large Language Models" (arXiv:2301.10226): the tokens seed a generator, which
permutes the vocabulary; the first `gamma` of it are green, and their logits are raised by `delta`. Left hash is its
algorithm 2, self hash its algorithm 3. Seeds and permutations are those of transformers' `WatermarkLogitsProcessor` on
a CPU to the bit, and with as many ids those of the authors' `simple_1`.

Permutations are made on the CPU on every device: a CUDA generator gives others. V = ids that a list is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .watermark_options import SELF_HASH, GreenListOptions, WatermarkOptions

_NUM_CANDIDATES = 40  # of self hash, the likeliest tokens: a list for each id of the vocabulary would take too long
_TABLE_SIZE = 1_000_003
_MOST_SEEDS = 2**64 - 1
_KEPT_LISTS = 4096  # each V / 8 bytes, 26 MB for OPT; a list takes 0.5 ms to make


@lru_cache(_KEPT_LISTS)
def green_bits(seed: int, num_listed: int, num_green: int) -> np.ndarray:
    """The green list of a seed: a bit for each id, [ceil(V / 8)] uint8, the lowest bit first.

    Args:
        num_listed: V.
    """
    generator = torch.Generator().manual_seed(seed)
    is_green = np.zeros(num_listed, dtype=np.uint8)
    is_green[torch.randperm(num_listed, generator=generator, device="cpu")[:num_green].numpy()] = 1
    return np.packbits(is_green, bitorder="little")


def left_hash_seed(key: int, previous: int) -> int:
    """The seed of the list after a token."""
    return key * previous % _MOST_SEEDS


def self_hash_seed(key: int, tokens: Sequence[int]) -> int:
    """The seed of the list that decides whether the last of `tokens` is green after the others."""
    hashes = _hash_table(key)[np.asarray(tokens) % _TABLE_SIZE]
    # The products wrap at 64 bits, as transformers' do.
    return int((np.int64(key) * hashes * hashes[-1:]).min()) % _MOST_SEEDS


@lru_cache(8)
def _hash_table(key: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(key)
    return torch.randperm(_TABLE_SIZE, generator=generator, device="cpu").numpy() + 1


class GreenLists:
    """The green lists of one key.

    Args:
        vocab_size: the model's rows.

    Attributes:
        num_listed: V.
    """

    def __init__(self, options: GreenListOptions, vocab_size: int) -> None:
        self._key, self._width = options.watermark_key, options.watermark_context_width
        self._is_self_hash = options.watermark_scheme == SELF_HASH
        self.num_listed = options.num_listed(vocab_size)
        self._num_green = int(self.num_listed * options.watermark_gamma)

    @property
    def ngram_size(self) -> int:
        """Tokens that decide whether the last of them is green, itself included."""
        return self._width if self._is_self_hash else self._width + 1

    def is_green(self, ngram: Sequence[int]) -> bool:
        """Whether the last token of an n-gram is green after the others."""
        token = ngram[-1]
        seed = self_hash_seed(self._key, ngram) if self._is_self_hash else left_hash_seed(self._key, ngram[-2])
        bits = green_bits(seed, self.num_listed, self._num_green)
        return token < self.num_listed and bool(bits[token >> 3] >> (token & 7) & 1)

    def green_mask(self, tokens: Sequence[int], scores: Tensor) -> Tensor:
        """Which ids to prefer after `tokens`, [vocabulary] bool; with self hash only likely ones by `scores`."""
        mask = np.zeros(len(scores), dtype=bool)
        if len(tokens) < self._width:
            return torch.from_numpy(mask)
        if self._is_self_hash:
            before = list(tokens[len(tokens) - self._width + 1 :])
            mask[[token for token in _likeliest(scores) if self.is_green([*before, token])]] = True
        else:
            bits = green_bits(left_hash_seed(self._key, tokens[-1]), self.num_listed, self._num_green)
            mask[: self.num_listed] = np.unpackbits(bits, count=self.num_listed, bitorder="little")
        return torch.from_numpy(mask)


def _likeliest(scores: Tensor) -> list[int]:
    """The ids of the best scores [vocabulary], best first, and of equal ones the lower id first."""
    lowest = scores.topk(min(_NUM_CANDIDATES, len(scores))).values[-1]
    ids = (scores >= lowest).nonzero().squeeze(1)  # those that tie with the last included
    return ids[scores[ids].argsort(descending=True, stable=True)][:_NUM_CANDIDATES].tolist()


def prefer_green(scores: Tensor, options: WatermarkOptions, tokens: Sequence[int]) -> Tensor:
    """Add the watermark to scores [vocabulary] of the token that follows `tokens`; nothing where they are too few."""
    mask = GreenLists(options, len(scores)).green_mask(tokens, scores).to(scores.device)
    return torch.where(mask, scores + options.mark, scores)
