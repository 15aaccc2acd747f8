"""Which corpora training and validation samples come from: --data-path, --split and the like, parsed and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from .indexed_dataset import IndexedFile, exists
from .options import DataOptions

_SPLIT_NAMES = ("training", "validation")  # the first two of megatron-core's splits, in its order
_WHOLE_SPLITS = ("1,0,0", "0,1,0")  # the split that gives every document to training or to validation


@dataclass(frozen=True)
class Blend:
    """The corpora that the samples of one split come from.

    Attributes:
        index: of the split: 0 is training, 1 validation.
        prefixes: of the .bin/.idx pairs.
        weights: shares of the corpora; None before `weighted`, and where every sample is taken once.
        split: shares of the documents for training, validation and testing.
        num_samples: None takes every sample once.
    """

    index: int
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    split: str
    num_samples: int | None

    def weighted(self, files: dict[str, IndexedFile], seq_length: int) -> Blend:
        """The blend with the weights to mix by: those given, or the numbers of tokens.

        Raises:
            UserError: a corpus holds less than one sequence for this split.
        """
        tokens = [_tokens_in_split(self, files[prefix], seq_length) for prefix in self.prefixes]
        if len(tokens) == 1 or self.num_samples is None:
            return replace(self, weights=None)
        # Without weights megatron-core would stop after one epoch.
        return replace(self, weights=self.weights or tuple(float(count) for count in tokens))


def corpora(options: DataOptions) -> list[str]:
    """The prefixes of all corpora that the options name.

    Raises:
        UserError: an option is neither prefixes nor weights with prefixes.
    """
    given = {
        "--data-path": options.data_path,
        "--train-data-path": options.train_data_path,
        "--valid-data-path": options.valid_data_path,
    }
    return [prefix for flag, words in given.items() if words for prefix in _parse_blend(flag, words)[0]]


def read_blends(options: DataOptions, num_train_samples: int, num_valid_samples: int | None) -> list[Blend]:
    """The blend of training and, unless `num_valid_samples` is 0, that of validation.

    Raises:
        UserError: options are missing or contradict each other.
    """
    if num_train_samples < 1:
        raise UserError(f"{num_train_samples} training samples were asked for; there must be at least 1")
    if num_valid_samples is not None and num_valid_samples < 0:
        raise UserError(f"{num_valid_samples} validation samples were asked for; use 0 for no validation")
    sizes: list[int | None] = [num_train_samples]
    if num_valid_samples != 0:
        sizes.append(num_valid_samples)
    if options.data_path:
        return _blends_by_split(options, options.data_path, sizes)
    if not options.train_data_path:
        raise UserError(
            "there is no training data: give --data-path PREFIX, or --train-data-path PREFIX (as written by preprocess)"
        )
    paths = [("--train-data-path", options.train_data_path)]
    if len(sizes) > 1:
        if not options.valid_data_path:
            raise UserError("there is no validation data: give --valid-data-path PREFIX, or ask for no validation")
        paths.append(("--valid-data-path", options.valid_data_path))
    return [
        Blend(index, *_parse_blend(flag, words), _WHOLE_SPLITS[index], sizes[index])
        for index, (flag, words) in enumerate(paths)
    ]


def _blends_by_split(options: DataOptions, data_path: Sequence[str], sizes: list[int | None]) -> list[Blend]:
    if options.train_data_path or options.valid_data_path:
        raise UserError("--data-path (with --split) and --train-data-path/--valid-data-path exclude each other")
    shares = _split_shares(options.split)
    if len(sizes) > 1 and not shares[1]:
        raise UserError(
            f"--split {options.split} leaves nothing to validation: give it a second number, or ask for no validation"
        )
    prefixes, weights = _parse_blend("--data-path", data_path)
    return [Blend(index, prefixes, weights, options.split, size) for index, size in enumerate(sizes)]


def _split_shares(split: str) -> list[float]:
    words = split.split(",")
    if not 1 <= len(words) <= 3 or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", word.strip()) for word in words):
        raise UserError(f"--split is {split!r}, but must be one to three shares as in 969,30,1")
    shares = [*map(float, words), 0.0, 0.0][:3]
    if not shares[0]:
        raise UserError(f"--split {split} leaves nothing to training")
    return shares


def _parse_blend(flag: str, words: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Prefixes and weights of `P`, `P Q ...` or `w P v Q ...`."""
    # A corpus may be called 2024: a word is a prefix if there are files of that name.
    numbers = [None if exists(word) else _number(word) for word in words]
    if all(number is None for number in numbers):
        return tuple(words), None
    weights = [number for number in numbers[::2] if number is not None]
    if 2 * len(weights) != len(words) or any(number is not None for number in numbers[1::2]):
        raise UserError(f"{flag} must be prefixes alone or weight prefix weight prefix ..., not {' '.join(words)}")
    for word, weight in zip(words[::2], weights, strict=True):
        if not 0 < weight < float("inf"):
            raise UserError(f"{flag}: the weight {word} must be a positive number; leave out what is not wanted")
    return tuple(words[1::2]), tuple(weights)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _tokens_in_split(blend: Blend, file: IndexedFile, seq_length: int) -> int:
    share = _split_matrix(blend.split)[blend.index]
    sequences = len(file.lengths)
    begin, end = (round(edge * float(sequences)) for edge in share or (0, 0))  # rounded as in megatron-core
    tokens = file.num_tokens(begin, end)
    if tokens < seq_length + 1:
        of_split = "" if blend.split in _WHOLE_SPLITS else f" (--split {blend.split})"
        raise UserError(
            f"{file.prefix}: {end - begin} of {sequences} documents are for {_SPLIT_NAMES[blend.index]}{of_split}, "
            f"with {tokens} tokens, fewer than one sequence of {seq_length} + 1: give more text, another split, "
            "or a shorter --seq-length"
        )
    return tokens


def _split_matrix(split: str) -> list[tuple[float, float] | None]:
    from megatron.core.datasets import blended_megatron_dataset_config as core

    return core.convert_split_vector_to_split_matrix(core.parse_and_normalize_split(split))
