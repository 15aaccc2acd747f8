"""Random numbers that are a function of a request's seed and of what they are for, and so need no state.

Philox (`philox.py`) makes them: a token's number has the same bits on a CPU and on a GPU, alone and in any batch, and
at any layout.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ...philox import WORD_MASK, Word, philox

_CHUNK = 64  # numbers of one request that are made at a time


class Purpose(IntEnum):
    """What a number decides; one of the words that Philox encrypts."""

    TOKEN = 0  # the choice of a token from the model's distribution
    DRAFT = 1  # the choice of a proposal from a draft's distribution
    ACCEPT = 2  # whether a proposal is accepted
    RESIDUAL = 3  # the choice of a token in place of a rejected proposal


def uniform(seeds: Tensor, choices: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """Numbers from 0 up to but not including 1, float64 of 53 random bits; the arguments broadcast.

    Args:
        seeds: int64, of requests.
        choices: int64, which of a request's continuations.
        positions: int64, of the token that is chosen, counted from the beginning of its sequence.
    """
    zero = torch.zeros_like(positions)
    words = philox((positions, choices + zero, zero + int(purpose), zero), (seeds & WORD_MASK, seeds >> 32 & WORD_MASK))
    return _upper_bits(words[0], words[1]).double() * 2.0**-53


def _upper_bits(first: Word, second: Word) -> Word:
    """53 bits of two words."""
    return (first >> 5) * 2**26 + (second >> 6)


class RandomNumbers:
    """The numbers of one continuation as `uniform` gives them, for choices that are made on the host.

    Args:
        seed: of the request, 64 bits.
        choice: which of the request's continuations.
    """

    def __init__(self, seed: int, choice: int = 0) -> None:
        self._key = np.array([seed & WORD_MASK]), np.array([seed >> 32 & WORD_MASK])
        self._choice = np.array([choice])
        self._chunks: dict[Purpose, tuple[int, list[float]]] = {}  # the last one made: its number, and its contents

    def at(self, position: int, purpose: Purpose = Purpose.TOKEN) -> float:
        """The number for a token at `position` of its sequence."""
        chunk, index = divmod(position, _CHUNK)
        if self._chunks.get(purpose, (-1, []))[0] != chunk:
            positions = np.arange(chunk * _CHUNK, (chunk + 1) * _CHUNK, dtype=np.int64)
            # numpy, since torch takes longer for so few numbers.
            words = philox((positions, self._choice, np.array([int(purpose)]), np.array([0])), self._key)
            self._chunks[purpose] = chunk, (_upper_bits(words[0], words[1]) * 2.0**-53).tolist()
        return self._chunks[purpose][1][index]
