"""Fine-tuning examples: what has loss, packing without crossing, epochs, examples that are too long."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.data.supervised_dataset import SupervisedDataset, first_fit
from opt_megatron.errors import UserError
from opt_megatron.tokenizer import OPTTokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)


def write(path: Path, examples: list[object]) -> list[str]:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return [str(path)]


def segments(row: dict[str, torch.Tensor]) -> list[dict[str, list[float]]]:
    """The examples of a row, once its padding has been seen to be at the end and without loss."""
    ids = row["segment_ids"]
    count = int(ids.max())
    padding = ids == 0
    assert ids[~padding].tolist() == sorted(ids[~padding].tolist()) and not padding[: int((~padding).sum())].any()
    assert (row["tokens"][padding] == 1).all() and (row["labels"][padding] == 1).all()
    assert not row["loss_mask"][padding].any() and not row["position_ids"][padding].any()
    return [{name: value[ids == n].tolist() for name, value in row.items()} for n in range(1, count + 1)]


def test_loss_is_on_the_target_and_the_end_alone(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    paths = write(tmp_path / "x", [{"src": "Who came? ", "tgt": "A wolf. \n"}, {"text": "Once upon a time\n"}])
    data = SupervisedDataset(paths, tokenizer, 64, seed=1)
    assert len(data) == 1 and data.num_examples == 2 and data.report() == []
    row = data[0]
    assert {name: value.dtype for name, value in row.items()} == dict.fromkeys(
        ("tokens", "labels", "position_ids", "segment_ids"), torch.int64
    ) | {"loss_mask": torch.float32}
    source = tokenizer.encode("Who came? ", add_bos=False)
    target = [*tokenizer.encode("A wolf.", add_bos=False), EOS]
    text = [*tokenizer.encode("Once upon a time", add_bos=False), EOS]
    pair, plain = sorted(segments(row), key=lambda part: sum(part["loss_mask"]) == len(part["loss_mask"]))
    assert pair["tokens"] == [EOS, *source, *target][:-1] and pair["labels"] == [*source, *target]
    assert pair["loss_mask"] == [0.0] * len(source) + [1.0] * len(target)
    assert plain["tokens"] == [EOS, *text][:-1] and plain["labels"] == text
    assert pair["position_ids"] == list(range(len(source) + len(target)))


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=300), seed=st.integers(0, 99))
@settings(deadline=None)
def test_first_fit_places_each_example_once_and_never_beyond_a_row(lengths: list[int], seed: int) -> None:
    sizes = np.array(lengths)
    order = np.random.RandomState(seed).permutation(len(sizes))
    rows = first_fit(order, sizes, 16)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
    filled = [int(sizes[row].sum()) for row in rows]
    assert max(filled) <= 16
    if len(rows) <= 64:  # all stay open: first fit, of which no two rows could be one
        assert all(a + b > 16 for n, a in enumerate(filled) for b in filled[n + 1 :] if a <= 8 and b <= 8)


def test_first_fit_by_hand() -> None:
    #       0: 5 3       1: 6 2      2: 7
    rows = first_fit(np.arange(5), np.array([5, 6, 3, 7, 2]), 8)
    assert [row.tolist() for row in rows] == [[0, 2], [1, 4], [3]]


def test_every_epoch_has_every_example_in_another_order(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    words = ["wolf", "king", "queen", "the old woman and her cow", "fox and goose"] * 6
    paths = write(tmp_path / "x", [{"src": f"{n} ", "tgt": word} for n, word in enumerate(words)])
    one = SupervisedDataset(paths, tokenizer, 16, seed=3)
    data = SupervisedDataset(paths, tokenizer, 16, seed=3, num_samples=3 * len(one))

    def labels(row: dict[str, torch.Tensor]) -> list[tuple[float, ...]]:
        return [tuple(part["labels"]) for part in segments(row)]

    rows = [labels(data[n]) for n in range(len(data))]
    assert rows[: len(one)] == [labels(one[n]) for n in range(len(one))]
    first = [example for row in rows[: len(one)] for example in row]
    assert len(first) == len(set(first)) == 30
    second = [example for row in rows[len(one) :] for example in row][:30]
    assert set(second) == set(first) and second != first
    again = SupervisedDataset(paths, tokenizer, 16, seed=3, num_samples=3 * len(one))
    assert labels(again[len(again) - 1]) == rows[-1]  # at once, as a resumed run asks
    assert labels(again[0]) == rows[0]
    other = SupervisedDataset(paths, tokenizer, 16, seed=4)
    assert [labels(other[n]) for n in range(len(other))] != rows[: len(one)]
    with pytest.raises(IndexError):
        data[len(data)]


def test_without_packing_each_example_has_its_row(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    paths = write(tmp_path / "x", [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    data = SupervisedDataset(paths, tokenizer, 16, seed=1, pack=False)
    assert len(data) == 3
    assert all(len(segments(data[n])) == 1 for n in range(3))


def test_of_a_long_source_the_end_stays_and_a_long_target_is_skipped(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    source = tokenizer.encode(" ".join(map(str, range(50))), add_bos=False)
    target = tokenizer.encode("a wolf", add_bos=False)
    examples = [{"src": " ".join(map(str, range(50))), "tgt": "a wolf"}, {"src": "", "tgt": "wolf " * 40}]
    data = SupervisedDataset(write(tmp_path / "x", examples), tokenizer, 8, seed=1)
    assert (data.num_examples, data.num_truncated, data.num_skipped) == (1, 1, 1)
    (part,) = segments(data[0])
    assert part["tokens"][0] == EOS
    assert part["labels"] == [*source[len(source) - 8 + len(target) + 1 :], *target, EOS]
    assert sum(part["loss_mask"]) == len(target) + 1
    assert [line[:40] for line in data.report()] == [
        "src was cut at its beginning in 1 exampl",
        "1 examples were skipped: tgt alone is lo",
    ]


def test_a_long_text_goes_on_in_further_examples(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    text = "Once upon a time there was a king who had three sons and a golden apple tree."
    ids = [*tokenizer.encode(text, add_bos=False), EOS]
    data = SupervisedDataset(write(tmp_path / "x", [{"text": text}]), tokenizer, 7, seed=1, pack=False)
    parts = [segments(data[n])[0] for n in range(len(data))]
    assert len(parts) == -(-len(ids) // 7) and data.num_split == 1
    assert all(part["tokens"] == [EOS, *part["labels"][:-1]] for part in parts)
    pieces = [ids[n : n + 7] for n in range(0, len(ids), 7)]
    assert sorted(part["labels"] for part in parts) == sorted(pieces)


def test_lines_without_an_example(tmp_path: Path, tokenizer: OPTTokenizer) -> None:
    examples = [
        {"tgt": "a"},
        {"src": 1, "tgt": "a"},
        {"src": "a"},
        {"src": "a", "tgt": " "},
        {"x": 1},
        {"text": "good"},
    ]
    paths = write(tmp_path / "x", examples)
    data = SupervisedDataset(paths, tokenizer, 8, seed=1)
    assert data.num_examples == 1 and data.bad.count == 5
    assert [(bad.line, bad.reason) for bad in data.bad.first] == [
        (1, "has no 'src'"),
        (2, "'src' is not a string"),
        (3, "has no 'tgt'"),
        (4, "'tgt' is empty"),
        (5, "has neither 'src' and 'tgt' nor 'text'"),
    ]
    with pytest.raises(UserError, match=f"{paths[0]}:1: has no 'src'"):
        SupervisedDataset(paths, tokenizer, 8, seed=1, strict=True)
    with pytest.raises(UserError, match="no example to train on; 1 examples were skipped"):
        SupervisedDataset(write(tmp_path / "y", [{"src": "", "tgt": "wolf " * 9}]), tokenizer, 8, seed=1)
