"""Calibration samples are those that the references' own lines draw; what is too short is refused in a sentence."""

import gzip
import json
import random

import pytest

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.compression.options import CalibrationOptions
from opt_megatron.compression.samples import read_samples
from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError
from opt_megatron.tokenizer import OPTTokenizer

CONFIG = OPTConfig.from_path(EMBEDDED_DIRECTORY)
TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
TEXTS = [f"There was once a king who had {number} sons. " * (1 + number % 7) for number in range(40)]


def read(path, **options):
    return read_samples(CalibrationOptions(calibration_data=str(path), **options), CONFIG, TOKENIZER).tokens


def json_lines(path, key, values):
    path.write_text("".join(json.dumps({key: value}) + "\n" for value in values))
    return path


def test_starts_in_one_text(tmp_path):
    """As get_wikitext2 of IST-DASLab/gptq, datautils.py: `randint(0, n - seqlen - 1)` after `random.seed(seed)`."""
    plain = tmp_path / "train.txt"
    plain.write_text("\n\n".join(TEXTS))
    lines = json_lines(tmp_path / "train.jsonl", "text", TEXTS)
    ids = TOKENIZER.encode("\n\n".join(TEXTS))
    random.seed(3)
    starts = [random.randint(0, len(ids) - 64 - 1) for _ in range(5)]
    expected = tuple(tuple(ids[start : start + 64]) for start in starts)
    options = {"calibration_samples": 5, "calibration_length": 64, "seed": 3}
    assert read(plain, **options) == read(lines, **options) == expected
    assert len(read(plain, calibration_length=64)) == 128


def test_documents_of_a_directory(tmp_path):
    """As get_c4 of locuslab/wanda, lib/data.py: documents that are too short use up draws."""
    (tmp_path / "c4-validation.00000-of-00008.json").write_text('{"text": "other"}\n')
    with gzip.open(tmp_path / "c4-train.00000-of-01024.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS)
    random.seed(0)
    expected = []
    for _ in range(6):
        while True:
            ids = TOKENIZER.encode(TEXTS[random.randint(0, len(TEXTS) - 1)])
            if len(ids) > 40:
                break
        start = random.randint(0, len(ids) - 40 - 1)
        expected.append(tuple(ids[start : start + 40]))
    assert read(tmp_path, calibration_samples=6, calibration_length=40) == tuple(expected)


def test_windows_of_tokens(tmp_path):
    path = json_lines(tmp_path / "windows.jsonl", "tokens", [[2, 5, 7], [9, 4], [8]])
    assert read(path) == ((2, 5, 7), (9, 4), (8,))
    assert read(path, calibration_samples=2) == ((2, 5, 7), (9, 4))


def test_mistakes(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("There was once a king.")
    windows = json_lines(tmp_path / "windows.jsonl", "tokens", [[2, 5], [4097]])
    texts = json_lines(tmp_path / "texts.jsonl", "body", TEXTS)
    (tmp_path / "empty").mkdir()
    for path, options, message in (
        (short, {}, "short.txt has 7 tokens, too few for samples of 512: give more text, or a smaller"),
        (short, {"calibration_length": 513}, "--calibration-length 513 is more than the model's 512 positions"),
        (windows, {"calibration_samples": 3}, "has 2 windows of tokens"),
        (windows, {}, "line 2"),
        (texts, {}, "line 1: has no 'text' (--json-key names another key)"),
        (tmp_path / "empty", {}, "has no .json or .jsonl files"),
        (tmp_path / "missing", {}, "missing: cannot be read: No such file"),
    ):
        with pytest.raises(UserError) as raised:
            read(path, **options)
        assert message in str(raised.value)
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        read_samples(CalibrationOptions(calibration_data=str(short), calibration_length=2), CONFIG, None)
