"""Blocks of tokens for pre-training: megatron-core's GPTDataset and its blends behind one function.

Documents are shuffled, concatenated and cut into blocks of `seq_length + 1` (input and shifted target); loss and
attention cross document borders, as in OPT's recipe. The order is a function of the data, the seed, the sequence
length and the number of training samples (core shuffles the epochs of a run together), so a resumed run must
ask for the same number.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError
from ..files import staging_directory
from ..parallel.context import ParallelContext, check_seed, on_all_ranks
from ..parallel.core_compat import import_core
from .indexed_dataset import IndexedFile, beyond, check_tokens, exists, open_indexed
from .options import DataOptions

_PARTS = ("training", "validation")  # the first two of core's splits, in its order
_WHOLE = ("1,0,0", "0,1,0")  # the split that gives every document to that part


class PretrainingDataset(torch.utils.data.Dataset):
    """Samples by number: tokens, labels, position_ids (int64) and loss_mask (float32), each [s].

    Labels that are `pad` have no loss. There are exactly the samples that were asked for.
    """

    def __init__(self, samples: Any, length: int, vocab_size: int, pad: int) -> None:
        self._samples, self._length = samples, length
        self._vocab_size, self._pad = vocab_size, pad

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample.

        Raises:
            UserError: a token id that the model does not have, which the check of the files did not meet.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        sample = self._samples[index]
        tokens, labels = sample["tokens"], sample["labels"]
        highest = int(max(tokens.max(), labels[-1]))
        if highest >= self._vocab_size:
            raise UserError(beyond(f"sample {index} of the training data", highest, self._vocab_size))
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": (labels != self._pad).float(),
            "position_ids": sample["position_ids"],
        }


def build_datasets(
    options: DataOptions,
    parallel: ParallelContext,
    *,
    num_train_samples: int,
    num_valid_samples: int | None,
    seq_length: int,
    seed: int,
    vocab_size: int,
    eod: int = 2,
    pad: int = 1,
) -> tuple[PretrainingDataset, PretrainingDataset | None]:
    """The training and the validation set. To be called on all ranks; rank 0 checks the files and builds the indices.

    Args:
        num_train_samples: sequences of the whole run, over as many epochs as that takes.
        num_valid_samples: the same for validation; 0 is no validation, None is one pass over all of it.
        seq_length: tokens of a sample; each is cut out of the data with one more for the last label.
        vocab_size: rows of the model's embedding, which the token ids are checked against.
        eod, pad: ids of the tokenizer; a label `pad` has no loss.

    Raises:
        UserError: options that contradict each other, files that are missing, damaged or hold too little,
            token ids that the model does not have, no place for the indices. The same on every rank.
    """
    check_seed(seed)
    if seq_length < 1:
        raise UserError(f"--seq-length is {seq_length}, but must be at least 1")
    import_core()

    def prepare() -> tuple[list[_Part], _Cache] | None:
        if not parallel.is_leader:
            return None
        parts = _plan(options, num_train_samples, num_valid_samples)
        return _prepare(options, parts, seq_length, seed, vocab_size)

    parts, cache = parallel.broadcast_object(on_all_ranks(parallel, prepare))
    try:
        on_all_ranks(parallel, lambda: cache.check_shared(parts))
        tokenizer = _TokenizerFacts(vocab_size, eod)
        built = [_build(part, cache.path, tokenizer, seq_length, seed, pad) for part in parts]
        dist.barrier(group=parallel.control_group)  # from here on no rank needs the files by their names
        if parallel.is_leader:
            cache.publish()
    finally:
        if parallel.is_leader:
            cache.remove_unpublished()
    return built[0], built[1] if len(built) > 1 else None


# ---- options ----


@dataclass(frozen=True)
class _Part:
    """What training or validation is drawn from."""

    index: int  # in _PARTS
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None  # None: by their numbers of tokens
    split: str
    num_samples: int | None  # None: every sample once


def _plan(options: DataOptions, num_train_samples: int, num_valid_samples: int | None) -> list[_Part]:
    if num_train_samples < 1:
        raise UserError(f"{num_train_samples} training samples were asked for; there must be at least 1")
    if num_valid_samples is not None and num_valid_samples < 0:
        raise UserError(f"{num_valid_samples} validation samples were asked for; use 0 for no validation")
    sizes = [num_train_samples] if num_valid_samples == 0 else [num_train_samples, num_valid_samples]
    if options.data_path:
        if options.train_data_path or options.valid_data_path:
            raise UserError("--data-path (with --split) and --train-data-path/--valid-data-path exclude each other")
        shares = _split_shares(options.split)
        if len(sizes) > 1 and not shares[1]:
            raise UserError(
                f"--split {options.split} leaves nothing to validation: give it a second number, "
                "or ask for no validation"
            )
        blend = _parse_blend("--data-path", options.data_path)
        return [_Part(index, *blend, options.split, size) for index, size in enumerate(sizes)]
    if not options.train_data_path:
        raise UserError(
            "there is no training data: give --data-path PREFIX, or --train-data-path PREFIX (as written by preprocess)"
        )
    paths = [("--train-data-path", options.train_data_path), ("--valid-data-path", options.valid_data_path)]
    if len(sizes) > 1 and not options.valid_data_path:
        raise UserError("there is no validation data: give --valid-data-path PREFIX, or ask for no validation")
    return [
        _Part(index, *_parse_blend(*paths[index]), _WHOLE[index], size)  # type: ignore[arg-type]
        for index, size in enumerate(sizes)
    ]


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
    numbers = [_number(word) for word in words]
    # A corpus may be called 2024; it is one where its files are.
    numbers = [None if exists(word) else number for word, number in zip(words, numbers, strict=True)]
    if all(number is None for number in numbers):
        return tuple(words), None
    if len(words) % 2 or any(number is None for number in numbers[::2]) or any(n is not None for n in numbers[1::2]):
        raise UserError(f"{flag} must be prefixes alone or weight prefix weight prefix ..., not {' '.join(words)}")
    for word, weight in zip(words[::2], numbers[::2], strict=True):
        if not 0 < weight < float("inf"):  # type: ignore[operator]
            raise UserError(f"{flag}: the weight {word} must be a positive number; leave out what is not wanted")
    return tuple(words[1::2]), tuple(numbers[::2])  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# ---- indices ----


@dataclass(frozen=True)
class _Cache:
    """Where core keeps the shuffled indices of one set of files and options.

    They are written in a directory of this run and get their place by renaming, so that a killed run leaves no
    half-written index that a later one would take for whole. (Core itself looks only whether files exist, and
    its names do not depend on what the data files contain.)
    """

    path: Path
    final: Path | None  # None: `path` is for this run alone

    def check_shared(self, parts: list[_Part]) -> None:
        """Raise UserError where this rank cannot see the data or the directory of rank 0."""
        for prefix in [prefix for part in parts for prefix in part.prefixes]:
            if not Path(f"{prefix}.bin").is_file() or not Path(f"{prefix}.idx").is_file():
                raise UserError(f"{prefix}: rank 0 has these files, but this rank does not see them")
        if not self.path.is_dir():
            raise UserError(
                f"{self.path}: this rank does not see the directory of indices that rank 0 has made: "
                "set --data-cache-path to one on a file system that all machines share"
            )

    def publish(self) -> None:
        """Rename, unless another run has been faster."""
        if self.final is not None and self.path != self.final and not self.final.exists():
            self.path.rename(self.final)

    def remove_unpublished(self) -> None:
        """Leave nothing that later runs will not use."""
        if self.path != self.final:
            shutil.rmtree(self.path, ignore_errors=True)


def _prepare(
    options: DataOptions, parts: list[_Part], seq_length: int, seed: int, vocab_size: int
) -> tuple[list[_Part], _Cache]:
    """On rank 0: check the files, find the weights, choose the directory of the indices."""
    files = {prefix: open_indexed(prefix) for part in parts for prefix in part.prefixes}
    parts = [_weigh(part, files, seq_length) for part in parts]
    stats = [Path(f"{prefix}{end}").stat() for prefix in files for end in (".bin", ".idx")]
    identity = {
        "core": version("megatron-core"),
        "files": [_full(prefix) for prefix in files],
        "contents": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
        "parts": [asdict(part) for part in parts],
        "numbers": [seq_length, seed, vocab_size],
    }
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    root = Path(options.data_cache_path or Path(next(iter(files)), "cache"))
    if (root / name).is_dir():
        return parts, _Cache(root / name, root / name)  # and the token ids have been checked, too
    for file in files.values():
        check_tokens(file, vocab_size)
    return parts, _make_cache(root, name, required=options.data_cache_path is not None)


def _full(prefix: str) -> str:
    return str(Path(prefix).resolve())  # core names its indices after the path as it is spelled


def _make_cache(root: Path, name: str, *, required: bool) -> _Cache:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _Cache(staging_directory(root), root / name)
    except OSError as error:
        if required:
            raise UserError(f"--data-cache-path {root}: cannot be written: {error.strerror}") from None
        print(
            f"opt-megatron: {root}: cannot be written ({error.strerror}), so the indices of the data are not kept; "
            "--data-cache-path DIR keeps them",
            file=sys.stderr,
        )
        return _Cache(Path(tempfile.mkdtemp(prefix="opt-megatron-")), None)


def _weigh(part: _Part, files: dict[str, IndexedFile], seq_length: int) -> _Part:
    """The part with the weights that core shall mix by, once each corpus has been found to hold a sequence."""
    tokens = [_tokens_of(part, files[prefix], seq_length) for prefix in part.prefixes]
    if len(tokens) == 1 or part.num_samples is None:
        return replace(part, weights=None)
    # Without weights core would end after one epoch.
    return replace(part, weights=part.weights or tuple(float(count) for count in tokens))


def _tokens_of(part: _Part, file: IndexedFile, seq_length: int) -> int:
    share = _split_matrix(part.split)[part.index]
    sequences = len(file.lengths)
    begin, end = (round(edge * float(sequences)) for edge in share or (0, 0))  # core's own rounding
    tokens = file.num_tokens(begin, end)
    if tokens < seq_length + 1:
        of_split = "" if part.split in _WHOLE else f" (--split {part.split})"
        raise UserError(
            f"{file.prefix}: {end - begin} of {sequences} documents are for {_PARTS[part.index]}{of_split}, with "
            f"{tokens} tokens, fewer than one sequence of {seq_length} + 1: give more text, another split, "
            "or a shorter --seq-length"
        )
    return tokens


def _split_matrix(split: str) -> list[tuple[float, float] | None]:
    from megatron.core.datasets import blended_megatron_dataset_config as core

    return core.convert_split_vector_to_split_matrix(core.parse_and_normalize_split(split))


class _TokenizerFacts:
    """What core's datasets ask of a tokenizer.

    `pad` is no id at all: core would replace padding tokens by id 0, and mend its first loss mask for ever.
    """

    pad = -1

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod, self.eos = vocab_size, eod, eod
        self.unique_identifiers = {"vocab_size": vocab_size, "eod": eod}  # part of the names of cached indices


def _build(
    part: _Part, cache: Path, tokenizer: _TokenizerFacts, seq_length: int, seed: int, pad: int
) -> PretrainingDataset:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([_full(prefix) for prefix in part.prefixes], None if part.weights is None else list(part.weights)),
        split=part.split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.split_matrix = [share if n == part.index else None for n, share in enumerate(config.split_matrix)]
    sizes: list[int | None] = [0, 0, 0]
    sizes[part.index] = part.num_samples
    if part.weights is not None and part.num_samples is not None:
        # Rounding up adds up to one sample for each corpus, which the largest corpus may have to provide alone.
        config.mid_level_dataset_surplus += 2 * len(part.prefixes) / part.num_samples
    try:
        samples = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[part.index]
    except Exception as error:  # core wraps an OSError in a bare Exception
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            reason = error if isinstance(error, OSError) else error.__cause__
            raise UserError(f"{cache}: the indices of the data cannot be written or read: {reason}") from error
        raise
    return PretrainingDataset(samples, part.num_samples or len(samples), tokenizer.vocab_size, pad)
