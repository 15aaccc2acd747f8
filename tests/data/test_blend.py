"""Which documents of which corpora training and validation samples come from, and options that are refused."""

from __future__ import annotations

from pathlib import Path

from indexed_corpora import EOD, build, counting, refused, tokens, write

from opt_megatron.data.options import DataOptions
from opt_megatron.parallel.context import ParallelContext


def test_options_that_contradict_each_other(tmp_path: Path, alone: ParallelContext) -> None:
    a = write(tmp_path / "a", counting(9, 7))
    for options, valid, words in (
        (DataOptions(), 0, "there is no training data"),
        (DataOptions([a], train_data_path=[a]), 0, "exclude each other"),
        (DataOptions(train_data_path=[a]), 1, "there is no validation data"),
        (DataOptions([a], split="1,0"), 1, "leaves nothing to validation"),
        (DataOptions([a], split="0,1"), 1, "leaves nothing to training"),
        (DataOptions([a], split="a,b"), 0, "must be one to three shares"),
        (DataOptions([a], split="-1,2"), 0, "must be one to three shares"),
        (DataOptions(["0", a, "1", a]), 0, "weight 0 must be a positive number"),
        (DataOptions(["nan", a]), 0, "weight nan must be a positive number"),
        (DataOptions(["1", a, a]), 0, "must be prefixes alone or weight prefix"),
        (DataOptions([a, "1"]), 0, "must be prefixes alone or weight prefix"),
    ):
        assert words in refused(alone, options, valid=valid)


def test_split_gives_disjoint_documents_in_order(tmp_path: Path, alone: ParallelContext) -> None:
    documents = counting(10, 9)
    prefix = write(tmp_path / "a", documents)
    train, valid = build(alone, DataOptions([prefix], split="70,30"), train=9, valid=None)
    assert valid is not None and len(valid) == (3 * 9 - 1) // 6  # one pass
    border = documents[7][0]
    assert all(token < border for sample in tokens(train) for token in sample)
    assert all(token >= border or token == EOD for sample in tokens(valid) for token in sample)
    _, many = build(alone, DataOptions([prefix], split="70,30,0"), valid=11)
    assert many is not None and len(many) == 11  # and again from the beginning
