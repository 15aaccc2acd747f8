"""Random numbers: Philox by its authors' vectors, and statistics of the numbers over everything they depend on."""

import pytest
import torch

from opt_megatron.generation.sampling.random_numbers import Purpose, RandomNumbers, uniform
from opt_megatron.philox import philox

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_its_authors_numbers(counter, key, expected):
    assert philox(_words(counter), _words(key)) == _words(expected)


def numbers(seeds, choices, positions, purpose=Purpose.TOKEN) -> torch.Tensor:
    return uniform(torch.as_tensor(seeds), torch.as_tensor(choices), torch.as_tensor(positions), purpose)


MANY = torch.arange(1 << 16)
ZERO = torch.zeros(1, dtype=torch.int64)
SERIES = {
    "positions": numbers(7, 0, MANY),
    "seeds": numbers(MANY, 0, ZERO),
    "large seeds": numbers((MANY << 32) - 5, 0, ZERO),
    "choices": numbers(7, MANY, ZERO),
    "drafts": numbers(7, 0, MANY, Purpose.DRAFT),
    "accepted": numbers(7, 0, MANY, Purpose.ACCEPT),
    "residual": numbers(7, 0, MANY, Purpose.RESIDUAL),
}


@pytest.mark.parametrize("name", SERIES)
def test_numbers_are_uniform_and_neighbours_independent(name):
    values = SERIES[name]
    assert values.dtype == torch.float64 and values.min() >= 0 and values.max() < 1 and len(values.unique()) > 65_000
    # Pairs of neighbours in 16 x 16 cells, by their leading bits and by later ones: chi-square with 255 degrees of
    # freedom exceeds 350 in 1 of 15,000 cases. The numbers are always the same.
    for scale in (1, 2**20, 2**40):
        cells = (values * scale % 1 * 16).long()
        pairs = torch.bincount(cells[::2] * 16 + cells[1::2], minlength=256).double()
        expected = len(values) / 2 / 256
        assert ((pairs - expected) ** 2 / expected).sum() < 350


def test_series_are_not_correlated():
    series = torch.stack(list(SERIES.values()))
    correlations = torch.corrcoef(series) - torch.eye(len(series))
    assert correlations.abs().max() < 5 / len(MANY) ** 0.5


def test_a_number_depends_on_nothing_but_its_arguments():
    table = numbers([[3], [2**63 - 1], [-1]], [[0], [5], [1]], torch.arange(100)[None])
    for row, (seed, choice) in enumerate([(3, 0), (2**63 - 1, 5), (-1, 1)]):
        own = RandomNumbers(seed, choice)
        for position in (70, 3, 99, 0, 64, 63):
            assert own.at(position) == table[row, position]
            assert own.at(position, Purpose.ACCEPT) == numbers(seed, choice, position, Purpose.ACCEPT)
