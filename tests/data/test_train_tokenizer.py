"""Training a tokenizer: OPT's ids, equal for every reader and in every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from opt_megatron.data.train_tokenizer import train_tokenizer
from opt_megatron.errors import UserError
from opt_megatron.tokenizer import OPTTokenizer

TEXTS = ["The wolf and the fox went out to the forest. </s> <pad>", "The king's fox, and the queen's wolf!</s>"] * 4


def write(path: Path, texts: list[str]) -> list[str]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return [str(path)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    train_tokenizer(write(place / "x.jsonl", TEXTS), place / "tokenizer", 280)
    return place / "tokenizer"


@pytest.fixture(scope="module")
def readers(directory: Path) -> tuple[OPTTokenizer, Any]:
    return OPTTokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


def test_layout_is_special_tokens_then_bytes_then_merges(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    vocab = json.loads((directory / "vocab.json").read_text())
    by_id = sorted(vocab, key=vocab.get)
    assert by_id[:4] == ["<s>", "<pad>", "</s>", "<unk>"] and sorted(vocab.values()) == list(range(280))
    assert {len(token) for token in by_id[4:260]} == {1}
    merges = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [merge.replace(" ", "") for merge in merges] == by_id[260:]
    assert not {"</s>", "<pad>", "s>", "pad>"} & set(by_id[260:])


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<" not in text))
def test_this_project_and_transformers_read_it_the_same_way(readers: tuple[OPTTokenizer, Any], text: str) -> None:
    ours, theirs = readers
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 1)


def test_the_same_texts_give_the_same_files(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(write(tmp_path / "x", TEXTS[::-1]), tmp_path / "again", 280)
    for path in directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_an_existing_tokenizer_is_replaced_only_when_asked_and_alone(tmp_path: Path) -> None:
    inputs, place = write(tmp_path / "x", TEXTS), tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "tokenizer.json").write_text("of another tokenizer, which AutoTokenizer would prefer")
    with pytest.raises(UserError, match=r"holds a tokenizer already \(tokenizer.json\); --force replaces it"):
        train_tokenizer(inputs, place, 270)
    train_tokenizer(inputs, place, 270, force=True)
    assert (place / "config.json").exists() and not (place / "tokenizer.json").exists()
    assert len(OPTTokenizer.from_directory(place)) == 270
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x"]


def test_what_cannot_be_trained_leaves_nothing(tmp_path: Path) -> None:
    inputs = write(tmp_path / "x", [*TEXTS, ""])
    with pytest.raises(UserError, match="--vocab-size is 259, but 256 bytes and 4 special tokens take 260"):
        train_tokenizer(inputs, tmp_path / "out", 259)
    with pytest.raises(UserError, match="x:9: 'text' is empty"):
        train_tokenizer(inputs, tmp_path / "out", 270, strict=True)
    with pytest.raises(UserError, match="the input holds no texts; skipped 9 bad lines"):
        train_tokenizer(inputs, tmp_path / "out", 270, json_key="body")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert train_tokenizer(inputs, tmp_path / "out", 5000).vocab_size < 5000
