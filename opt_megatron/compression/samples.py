"""Calibration samples, drawn as the methods' own programs draw them (IST-DASLab/gptq and sparsegpt, locuslab/wanda).

a text, or JSON lines with "text"    joined by blank lines and tokenised as one text; starts drawn with a seed
JSON lines with "tokens"             each a window of ids, used as it is, the first ones
a directory like C4's                a document drawn until one is long enough, then a start in it
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import OPTConfig
from ..data.jsonl import BadLines, get_string, numbered_lines, parse_lines, parse_object, read_text_file
from ..errors import UserError
from ..tokenizer import OPTTokenizer
from .options import CalibrationOptions

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TOKENS = "tokens"
_DRAWS = 100_000  # documents that are looked at for one long enough


@dataclass(frozen=True)
class CalibrationSamples:
    """Windows of ids, and where they come from.

    Attributes:
        tokens: of each sample.
        source: the file or directory.
        sha256: of all ids as little-endian int32, one sample after the other.
    """

    tokens: tuple[tuple[int, ...], ...]
    source: str

    @property
    def sha256(self) -> str:
        """A hash of the ids, as little-endian int32, one sample after the other."""
        digest = hashlib.sha256()
        for ids in self.tokens:
            digest.update(np.asarray(ids, dtype="<i4").tobytes())
        return digest.hexdigest()


def read_samples(options: CalibrationOptions, config: OPTConfig, tokenizer: OPTTokenizer | None) -> CalibrationSamples:
    """Read the data and draw the samples.

    Raises:
        UserError: the data cannot be read, are shorter than a sample, or there is no tokenizer for texts.
    """
    assert options.calibration_data is not None
    path = Path(options.calibration_data)
    length = _length(options, config)
    if path.is_dir():
        drawn = _from_documents(_documents_of(path, options), length, options, _require(tokenizer))
    else:
        lines = _objects(path)
        if lines is not None and lines and _TOKENS in lines[0][1]:
            drawn = _windows(lines, path, options, config)
        else:
            texts = [_read(path)] if lines is None else [_text(path, line, options.json_key) for line in lines]
            drawn = _from_text("\n\n".join(texts), length, options, _require(tokenizer))
    return CalibrationSamples(tuple(tuple(ids) for ids in drawn), str(path))


def _length(options: CalibrationOptions, config: OPTConfig) -> int:
    positions = config.max_position_embeddings
    length = positions if options.calibration_length is None else options.calibration_length
    if length > positions:
        raise UserError(f"--calibration-length {length} is more than the model's {positions} positions")
    return length


def _require(tokenizer: OPTTokenizer | None) -> OPTTokenizer:
    if tokenizer is None:
        raise UserError('the checkpoint has no tokenizer: give --tokenizer DIR, or JSON lines with "tokens"')
    return tokenizer


def _from_text(text: str, length: int, options: CalibrationOptions, tokenizer: OPTTokenizer) -> list[list[int]]:
    ids = tokenizer.encode(text)
    if len(ids) < length + 2:  # as the references draw: the last start leaves a token
        raise UserError(
            f"--calibration-data {options.calibration_data} has {len(ids):,} tokens, too few for samples of "
            f"{length:,}: give more text, or a smaller --calibration-length"
        )
    generator = random.Random(options.seed)
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(options.num_samples)]
    return [ids[start : start + length] for start in starts]


def _from_documents(
    documents: Sequence[str], length: int, options: CalibrationOptions, tokenizer: OPTTokenizer
) -> list[list[int]]:
    generator, samples = random.Random(options.seed), []
    for _ in range(options.num_samples):
        ids: list[int] = []
        for _ in range(_DRAWS):
            ids = tokenizer.encode(documents[generator.randint(0, len(documents) - 1)])
            if len(ids) > length:
                break
        else:
            raise UserError(
                f"--calibration-data {options.calibration_data}: {_DRAWS:,} documents were drawn, and none has more "
                f"than {length:,} tokens: give a smaller --calibration-length"
            )
        start = generator.randint(0, len(ids) - length - 1)
        samples.append(ids[start : start + length])
    return samples


def _documents_of(directory: Path, options: CalibrationOptions) -> list[str]:
    """The texts of a directory's first file of training data by name, as C4's c4-train.00000-of-01024.json.gz."""
    names = sorted(file for file in directory.iterdir() if _is_json_lines(file))
    training = [file for file in names if "train" in file.name] or names
    if not training:
        raise UserError(f"--calibration-data {directory}: has no .json or .jsonl files (or .gz of them)")
    file, key = str(training[0]), options.json_key
    try:
        documents = list(parse_lines([file], lambda line: get_string(parse_object(line), key), BadLines()))
    except OSError as error:
        raise UserError(f"--calibration-data {file}: cannot be read: {error.strerror}") from None
    if not documents:
        raise UserError(f"--calibration-data {file}: no line has a text under {key!r} (--json-key names another)")
    return documents


def _windows(
    lines: list[tuple[int, dict[str, Any]]], path: Path, options: CalibrationOptions, config: OPTConfig
) -> list[list[int]]:
    wanted = len(lines) if options.calibration_samples is None else options.calibration_samples
    if wanted > len(lines):
        raise UserError(f"--calibration-samples {wanted}: --calibration-data {path} has {len(lines)} windows of tokens")
    windows = []
    for number, value in lines[:wanted]:
        where, ids = f"--calibration-data {path}, line {number}", value.get(_TOKENS)
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise UserError(f"{where}: {_TOKENS!r} is not a list of ids")
        config.check_token_ids(tuple(ids), where)
        if len(ids) > config.max_position_embeddings:
            raise UserError(f"{where}: {len(ids)} tokens are more than the {config.max_position_embeddings} positions")
        windows.append(ids)
    return windows


def _is_json_lines(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(_JSON_LINES)


def _objects(path: Path) -> list[tuple[int, dict[str, Any]]] | None:
    """The objects of a file of JSON lines with the numbers of their lines; None for a text."""
    if not _is_json_lines(path):
        return None
    objects = []
    for number, line in numbered_lines(_read(path)):
        try:
            objects.append((number, parse_object(line)))
        except ValueError as error:
            raise UserError(f"--calibration-data {path}, line {number}: {error}") from None
    return objects


def _read(path: Path) -> str:
    try:
        return read_text_file(path)
    except ValueError as error:
        raise UserError(f"--calibration-data {path}: {error}") from None


def _text(path: Path, line: tuple[int, dict[str, Any]], key: str) -> str:
    try:
        return get_string(line[1], key)
    except ValueError as error:
        raise UserError(f"--calibration-data {path}, line {line[0]}: {error} (--json-key names another key)") from None
