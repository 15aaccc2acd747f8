"""Small numbers packed into int32: a stream of bits along the first dimension, the lowest bits first (GPTQ's layout).

32 numbers of b bits take b words; a number may begin in one word and end in the next, as with 3 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

PER_STREAM = 32  # numbers that begin and end at a word


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, k] of uint8 [n, k]; 32 divides n."""
    streams = numbers.unflatten(0, (-1, PER_STREAM)).long()
    words = torch.zeros(streams.size(0), bits, numbers.size(1), dtype=torch.int64, device=numbers.device)
    for place in range(PER_STREAM):
        word, shift = divmod(place * bits, 32)
        words[:, word] |= streams[:, place] << shift
        if shift + bits > 32:
            words[:, word + 1] |= streams[:, place] >> (32 - shift)
    words &= 0xFFFFFFFF
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32).flatten(0, 1)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """uint8 [n, k] of int32 [n * bits / 32, k]."""
    streams = (words.long() & 0xFFFFFFFF).unflatten(0, (-1, bits))
    numbers = torch.empty(streams.size(0), PER_STREAM, words.size(1), dtype=torch.uint8, device=words.device)
    for place in range(PER_STREAM):
        word, shift = divmod(place * bits, 32)
        value = streams[:, word] >> shift
        if shift + bits > 32:
            value = value | streams[:, word + 1] << (32 - shift)
        numbers[:, place] = value & (2**bits - 1)
    return numbers.flatten(0, 1)
