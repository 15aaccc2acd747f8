"""Normal numbers: of the right distribution, and the same in every block."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from opt_megatron.checkpoint.mezo.normal_numbers import _by_torch, normal_block, seed_of_step
from opt_megatron.model.cpu_kernels import library
from opt_megatron.philox import philox

NAME = "model.decoder.layers.0.fc1.weight"


def test_they_are_box_and_mullers_of_philoxs_words() -> None:
    """Against numpy's logarithm, sine and cosine in float64."""
    seed, row, columns = 0x123456789ABCDEF0, 7, 10
    name = int.from_bytes(hashlib.blake2b(NAME.encode(), digest_size=8).digest(), "little")
    expected: list[float] = []
    for column in range(-(-columns // 4)):
        counter = (row, column, name & 0xFFFFFFFF, name >> 32)
        words = philox(
            tuple(np.array([word]) for word in counter),  # type: ignore[arg-type]
            (np.array([seed & 0xFFFFFFFF]), np.array([seed >> 32])),
        )
        for first, second in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(((int(first[0]) >> 8) + 1) / 2**24))
            # The angle's upper two bits reflect the quarter around 0 that the others choose from.
            quarter, angle = int(second[0]) >> 30, ((int(second[0]) >> 8 & 0x3FFFFF) / 2**22 - 0.5) * math.pi / 2
            point = [math.cos(angle), math.sin(angle)][:: -1 if quarter & 1 else 1]
            expected += [radius * (-1 if quarter & 2 else 1) * value for value in point]
    found = normal_block([5, seed], NAME, (slice(row, row + 1), slice(0, columns)))[1, 0]
    assert found.tolist() == pytest.approx(expected[:columns], abs=2e-6)


def test_a_block_is_a_part_of_the_whole_to_the_bit() -> None:
    whole = normal_block([1, 2], NAME, (slice(0, 37), slice(0, 41)))
    for block in ((slice(0, 37), slice(3, 4)), (slice(5, 6), slice(6, 41)), (slice(36, 37), slice(0, 40))):
        assert torch.equal(normal_block([1, 2], NAME, block), whole[:, *block])
        assert torch.equal(normal_block([2], NAME, block)[0], whole[1, *block])
    assert torch.equal(normal_block([1], NAME, (slice(9, 33),))[0], whole[0, 0, 9:33])


def test_they_are_normal_and_independent() -> None:
    numbers = normal_block([3], NAME, (slice(0, 500), slice(0, 400)))[0].double()
    ordered, count = numbers.flatten().sort()[0], numbers.numel()
    distance = (torch.special.ndtr(ordered) - torch.arange(1, count + 1) / count).abs().max()
    assert distance * math.sqrt(count) < 1.63  # Kolmogorov and Smirnov's test at 1%
    others = [normal_block([4], NAME, (slice(0, 500), slice(0, 400)))[0], numbers.roll(1, 0), numbers.roll(1, 1)]
    others += [normal_block([3], NAME + "x", (slice(0, 500), slice(0, 400)))[0]]
    for other in others:
        assert abs(float((numbers * other).mean())) * math.sqrt(count) < 4


def test_seeds_of_steps_differ() -> None:
    assert len({seed_of_step(seed, step) for seed in (1, 2) for step in range(1000)}) == 2000


@pytest.mark.skipif(library() is None, reason="there was no C++ compiler when the package was installed")
@pytest.mark.parametrize("instruction_set", ["base", "avx2", "avx512"])
def test_the_cpu_kernel_gives_torchs_bits(instruction_set: str) -> None:
    kernels = library()
    assert kernels is not None
    if not kernels.use_instruction_set(instruction_set):
        pytest.skip(f"this processor has no {instruction_set}")
    try:
        for columns in (slice(0, 300), slice(3, 298)):
            block = ([5, 2**64 - 1], 2**63 + 9, slice(10, 700), columns)
            assert torch.equal(kernels.normal_numbers(*block), _by_torch(*block, None))
    finally:
        kernels.use_instruction_set(None)
