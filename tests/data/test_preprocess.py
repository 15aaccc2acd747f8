"""Preprocessing: the right documents in the right order, bad lines reported, all or nothing written."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import preprocess as command
from opt_megatron.cli.option_groups import complete
from opt_megatron.data import jsonl
from opt_megatron.data.preprocess import preprocess
from opt_megatron.data.tokenizer_record import check_tokenizer
from opt_megatron.errors import UserError
from opt_megatron.tokenizer import OPTTokenizer

TEXTS = ["Once upon a time there was a king.", "  The wolf's house \n", "naïve 日本語 🙂\u0378", "x" * 5000, "The end"]


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents(prefix: str) -> list[list[int]]:
    """What megatron-core reads from the files."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [data[n].tolist() for n in range(len(data))]


def test_documents_are_stripped_texts_without_bos_and_with_eod(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", TEXTS)
    summary = preprocess([path, path], EMBEDDED_DIRECTORY, str(tmp_path / "p"), append_eod=True)
    expected = [[*tokenizer.encode(text.rstrip(), add_bos=False), 2] for text in TEXTS] * 2
    assert documents(f"{tmp_path}/p_text_document") == expected
    assert (summary.documents, summary.tokens) == (10, sum(map(len, expected)))
    assert summary.text_bytes == 2 * sum(len(text.rstrip().encode()) for text in TEXTS)
    assert summary.dtype == "uint16"
    assert os.path.getsize(f"{tmp_path}/p_text_document.bin") == 2 * summary.tokens
    preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "q"))
    assert documents(f"{tmp_path}/q_text_document") == [document[:-1] for document in expected[:5]]


def test_any_number_of_workers_and_any_chunks_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", [f"{n} {text}" for n in range(40) for text in TEXTS[:3]])
    preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "one"), append_eod=True)
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 100)
    preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "two"), append_eod=True, workers=2)
    for end in ("bin", "idx"):
        one, two = (tmp_path / f"{name}_text_document.{end}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


BAD = [
    (b"not json", "is not JSON (Expecting value, column 1)"),
    (b'["text"]', "is not an object, {...}"),
    (b'{"body": "x"}', "has no 'text'"),
    (b'{"text": 5}', "'text' is not a string"),
    (b'{"text": " \\n"}', "'text' is empty"),
    (b"", "is empty"),
    (b'{"text": "\xff"}', "is not UTF-8 (byte 11)"),
    (b'{"text": "a\\ud800b"}', "'text' has half of a surrogate pair, which is no text"),
    (b'{"text": "cut', "is not JSON (Unterminated string starting at, column 10)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_lines_are_skipped_and_told_with_their_numbers(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n' + line + b'\n{"text": "two"}')
    summary = preprocess([str(path)], EMBEDDED_DIRECTORY, str(tmp_path / "p"))
    assert summary.documents == 2
    assert summary.bad.report() == ["skipped 1 bad line:", f"{path}:2: {reason}"]
    with pytest.raises(UserError) as caught:
        preprocess([str(path)], EMBEDDED_DIRECTORY, str(tmp_path / "q"), strict=True)
    assert str(caught.value) == f"{path}:2: {reason} (with --strict no line may be bad)"
    assert not list(tmp_path.glob("*q_*"))


def test_of_many_bad_lines_the_first_are_named_whatever_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 64)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\nbad\n' * 50)
    summary = preprocess([str(path)], EMBEDDED_DIRECTORY, str(tmp_path / "p"), workers=2)
    report = summary.bad.report()
    assert summary.documents == 50 and report[0] == "skipped 50 bad lines, the first 5:"
    assert [line.split(":")[1] for line in report[1:]] == ["2", "4", "6", "8", "10"]


def test_damaged_compressed_files_are_refused(tmp_path: Path) -> None:
    packed = tmp_path / "x.jsonl.gz"
    for damaged in (gzip.compress(Path(write(tmp_path / "x.jsonl", TEXTS)).read_bytes())[:-9], b"plain text"):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x.jsonl.gz: cannot be unpacked"):
            preprocess([str(packed)], EMBEDDED_DIRECTORY, str(tmp_path / "p"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "x.jsonl.gz"]


def test_an_interrupted_run_leaves_nothing_and_the_former_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", TEXTS)
    preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "p"))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"p_text_document.bin: exists already; --force replaces it"):
        preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "p"))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 10)
    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            preprocess(
                [path],
                EMBEDDED_DIRECTORY,
                str(tmp_path / "p"),
                append_eod=True,
                force=True,
                workers=workers,
                progress=interrupt,
            )
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    preprocess([path], EMBEDDED_DIRECTORY, str(tmp_path / "p"), append_eod=True, force=True)
    assert all(document[-1] == 2 for document in documents(f"{tmp_path}/p_text_document"))


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    good = write(tmp_path / "x.jsonl", TEXTS)
    nothing = write(tmp_path / "y.jsonl", [" "])
    for inputs, values, words in (
        ([str(tmp_path / "none")], {}, "none: cannot be read: No such file or directory"),
        ([good, str(tmp_path)], {}, "is a directory; give the files in it"),
        ([nothing], {}, "the input holds no documents; skipped 1 bad line:; "),
        ([good], {"workers": 0}, "--workers is 0"),
        ([good], {"json_key": "a/b"}, "--json-key 'a/b'"),
    ):
        with pytest.raises(UserError) as caught:
            preprocess(inputs, EMBEDDED_DIRECTORY, str(tmp_path / "new" / "p"), **values)
        assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "y.jsonl"]


def test_the_command_says_what_it_wrote_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    path = write(tmp_path / "x.jsonl", ["Once upon a time", ""])
    words = ["--input", path, "--tokenizer", "story", "--output-prefix", str(tmp_path / "p"), "--workers", "1"]
    command.run(complete(parser.parse_args([*words, "--append-eod"])))
    shown = capsys.readouterr()
    last = shown.out.splitlines()[-1]
    assert last.startswith("1 documents, 5 tokens, 16 bytes of text in ") and last.endswith(" MB/s")
    assert f"{path}:2: 'text' is empty" in shown.err


def test_the_tokenizer_is_recorded_and_checked(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    prefix = preprocess([write(tmp_path / "x.jsonl", TEXTS)], EMBEDDED_DIRECTORY, str(tmp_path / "p")).prefix
    check_tokenizer(prefix, tokenizer)
    other = tmp_path / "other"
    shutil.copytree(EMBEDDED_DIRECTORY, other)
    vocab = json.loads((other / "vocab.json").read_text())
    names = list(vocab)
    vocab[names[300]], vocab[names[400]] = vocab[names[400]], vocab[names[300]]
    (other / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match="made with another tokenizer than the run's"):
        check_tokenizer(prefix, OPTTokenizer.from_directory(other))
    Path(f"{prefix}.json").write_text("{}")
    with pytest.raises(UserError, match="is not what preprocess writes"):
        check_tokenizer(prefix, tokenizer)
    Path(f"{prefix}.json").unlink()
    check_tokenizer(prefix, tokenizer)  # another program's corpus
