"""Random numbers that are a function of a request's seed and of what they are for, and so need no state.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405) in
integer arithmetic that is exact on every device: a token's number has the same bits on a CPU and on a GPU, alone and in
any batch, and at any layout.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_CHUNK = 64  # numbers of one request that are made at a time

Word = TypeVar("Word", Tensor, np.ndarray)  # 64-bit integers, of which 32 bits are used


class Purpose(IntEnum):
    """What a number decides; one of the words that Philox encrypts."""

    TOKEN = 0  # the choice of a token from the model's distribution
    DRAFT = 1  # the choice of a proposal from a draft's distribution
    ACCEPT = 2  # whether a proposal is accepted
    RESIDUAL = 3  # the choice of a token in place of a rejected proposal


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of counters and keys, 32-bit numbers in 64-bit integers that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for number in range(_ROUNDS):
        if number:
            k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
        # The products wrap at 64 bits, whose upper half the shift brings down with the sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32 & _WORD) ^ c1 ^ k0,
            right & _WORD,
            (left >> 32 & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
    return c0, c1, c2, c3


def uniform(seeds: Tensor, choices: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """Numbers from 0 up to but not including 1, float64 of 53 random bits; the arguments broadcast.

    Args:
        seeds: int64, of requests.
        choices: int64, which of a request's continuations.
        positions: int64, of the token that is chosen, counted from the beginning of its sequence.
    """
    zero = torch.zeros_like(positions)
    words = philox((positions, choices + zero, zero + int(purpose), zero), (seeds & _WORD, seeds >> 32 & _WORD))
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
        self._key = np.array([seed & _WORD]), np.array([seed >> 32 & _WORD])
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
