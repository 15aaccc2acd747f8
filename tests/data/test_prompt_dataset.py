"""Prompts with answers: their ids, what is cut and skipped, and the order of the epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.data.prompt_dataset import PromptDataset
from opt_megatron.errors import UserError
from opt_megatron.tokenizer import OPTTokenizer

TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_bos=False))


def dataset(tmp_path: Path, lines: list[Any], length: int = 64, **options: Any) -> PromptDataset:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PromptDataset([str(path)], TOKENIZER, length, seed=1, **options)


def test_an_answer_ends_with_the_end_of_the_text_and_a_candidate_does_not(tmp_path: Path) -> None:
    line = {"src": "The king was", "tgt": " glad", "candidates": [" sad and old", " glad"]}
    assert dataset(tmp_path, [line])[0] == ((2, *ids("The king was")), ((*ids(" glad"), 2),), 0)
    chosen = dataset(tmp_path, [line], has_candidates=True)[0]
    assert chosen == ((2, *ids("The king was")), (ids(" sad and old"), ids(" glad")), 1)


def test_long_prompts_lose_their_beginning_and_long_answers_are_skipped(tmp_path: Path) -> None:
    lines = [{"src": "one two three four", "tgt": " five"}, {"src": "", "tgt": " one two three four five six seven"}]
    source, target = ids("one two three four"), ids(" five")
    data = dataset(tmp_path, lines, length=len(target) + 1 + 2)  # BOS takes a position, the last </s> none
    assert data.num_examples == 1
    assert data[0] == ((2, *source[-2:]), ((*target, 2),), 0)
    assert data.report() == [
        "src was cut at its beginning in 1 examples, to 4 tokens",
        "1 examples were skipped: an answer alone is longer than 4 tokens",
    ]


def test_each_epoch_has_every_example_in_another_order(tmp_path: Path) -> None:
    lines = [{"src": f"{number}", "tgt": "x"} for number in range(20)]
    data, again = (dataset(tmp_path, lines, num_samples=40) for _ in range(2))
    epochs = [[data[index] for index in range(first, first + 20)] for first in (0, 20)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert [again[index] for index in (25, 3, 39)] == [epochs[1][5], epochs[0][3], epochs[1][19]]
    assert [dataset(tmp_path, lines)[index] for index in range(20)] == [data._examples[n] for n in range(20)]
    with pytest.raises(IndexError):
        data[40]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"src": "a", "tgt": "b"}, "has no 'candidates'"),
        ({"src": "a", "tgt": "b", "candidates": ["b"]}, "two or more texts"),
        ({"src": "a", "tgt": "b", "candidates": ["c", "d"]}, "'tgt' is none of the 'candidates'"),
        ({"src": "a", "tgt": "b", "candidates": ["b", "b "]}, "the same text twice"),
        ({"src": "a", "tgt": "b", "candidates": ["b", 7]}, "is not a string"),
        ({"src": "a", "tgt": "b", "candidates": ["b", " "]}, "is empty"),
        ({"text": "a"}, "has no 'src'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataset(tmp_path, [line], has_candidates=True)
