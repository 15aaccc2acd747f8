"""Standard normal numbers for the elements of a model's tensors, the same for every block in which they are made.

A number is a function of a seed, the tensor's name and the element's row and column. Philox gives four words for four
columns, and Box and Muller's transform (1958, doi:10.1214/aoms/1177706645) makes two normal numbers of two words:

    sqrt(-2 ln u) (cos t, sin t)        u in (0, 1], t an angle, of 24 bits each

Logarithm, sine and cosine are polynomials here, of sums, products, quotients and roots of float32, which IEEE 754
defines to the bit: the libraries' functions differ between devices, and on one between the elements of a vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...model.cpu_kernels import library
from ...philox import WORD_MASK, philox
from ..storage.blocks import Block

_LANES = 4  # numbers of one counter
_LN_2 = math.log(2)
_SQRT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) in float32
_LOG_SERIES = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)  # atanh(s) / s in s^2, |s| < 0.172
_SIN_SERIES = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)  # sin(t) / t in t^2, |t| <= pi / 4
_COS_SERIES = (1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0)


def normal_block(seeds: Sequence[int], name: str, block: Block, device: torch.device | None = None) -> Tensor:
    """The numbers of a block of a tensor for each seed, float32: [seeds, sizes of the block].

    Args:
        seeds: of 64 bits.
        name: of the tensor.
        block: of one dimension (a bias is one row) or two.
    """
    rows, columns = block if len(block) == 2 else (slice(0, 1), block[0])
    kernels = library() if device is None or device.type == "cpu" else None
    make = partial(_by_torch, device=device) if kernels is None else kernels.normal_numbers
    numbers = make(seeds, _hash(name), rows, columns)
    return numbers if len(block) == 2 else numbers[:, 0]


def _by_torch(seeds: Sequence[int], name: int, rows: slice, columns: slice, device: torch.device | None) -> Tensor:
    """[seeds, rows, columns]; csrc/normal.cpp gives the same bits."""
    first, last = columns.start // _LANES, -(-columns.stop // _LANES)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    column = torch.arange(first, last, device=device)
    words = philox((row, column, *_words([name], device)), _words(seeds, device))
    pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    numbers = torch.stack(pairs, -1).flatten(2)
    start = columns.start - first * _LANES
    return numbers[..., start : start + columns.stop - columns.start]


def piece_elements(device: torch.device) -> int:
    """How many numbers to make at a time: few enough for the cache of a CPU, or for the free memory of a GPU."""
    return 2**17 if device.type == "cpu" else 2**24


def seed_of_step(seed: int, step: int) -> int:
    """The 64-bit seed of step `step` of a run with this seed."""
    return _hash(f"{seed}/{step}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _words(values: Sequence[int], device: torch.device | None) -> tuple[Tensor, Tensor]:
    """The lower and the upper 32 bits of each value, [values, 1, 1]."""
    halves = [[value & WORD_MASK, value >> 32] for value in values]
    lower, upper = torch.tensor(halves, device=device)[:, :, None, None].unbind(1)
    return lower, upper


def _box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers of two words."""
    uniform = ((radius_bits >> 8) + 1).float() * 2.0**-24
    # Of float64, since MKL's root of float32 is not the nearest number; an error in the last bits of this one is no
    # matter, because no root of float32 is so close to the middle of two.
    radius = (_log(uniform) * -2.0).double().sqrt().float()
    # Two bits say which quarter of the circle the angle is in, and the others where in it.
    quarter, fraction = angle_bits >> 30, (angle_bits >> 8 & 0x3FFFFF) - 0x200000
    angle = fraction.float() * (math.pi / 2 * 2.0**-22)
    square = angle * angle
    sine, cosine = angle * _polynomial(_SIN_SERIES, square), _polynomial(_COS_SERIES, square)
    radius = torch.where(quarter >= 2, -radius, radius)
    is_swapped = (quarter & 1).bool()
    return radius * torch.where(is_swapped, sine, cosine), radius * torch.where(is_swapped, cosine, sine)


def _log(value: Tensor) -> Tensor:
    """The natural logarithm of positive normal float32."""
    bits = value.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).view(torch.float32)  # from sqrt(1/2) to sqrt(2)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent.float() * _LN_2 + ratio * 2.0 * _polynomial(_LOG_SERIES, ratio * ratio)


def _polynomial(coefficients: tuple[float, ...], value: Tensor) -> Tensor:
    """Horner's scheme, the highest power's coefficient first; every product and sum is rounded on its own."""
    result = value * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result = result.add_(coefficient).mul_(value)
    return result.add_(coefficients[-1])
