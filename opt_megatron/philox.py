"""Philox4x32-10: random bits that are a function of a counter and a key, and so need no state.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405, in integer arithmetic
that is exact on every device: a counter's words are the same on a CPU and on a GPU, alone and in any batch, and at any
layout.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

WORD_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Word = TypeVar("Word", Tensor, np.ndarray)  # 64-bit integers, of which 32 bits are used


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of counters and keys, 32-bit numbers in 64-bit integers that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for number in range(_ROUNDS):
        if number:
            k0, k1 = (k0 + _KEY_INCREMENTS[0]) & WORD_MASK, (k1 + _KEY_INCREMENTS[1]) & WORD_MASK
        # The products wrap at 64 bits, whose upper half the shift brings down with the sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> 32 & WORD_MASK) ^ c1 ^ k0,
            right & WORD_MASK,
            (left >> 32 & WORD_MASK) ^ c3 ^ k1,
            left & WORD_MASK,
        )
    return c0, c1, c2, c3
