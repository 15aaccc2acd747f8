"""Pre-training samples: what they contain, that their order is reproducible, and token ids that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_jobs import digest_of_batches
from indexed_corpora import EOD, build, counting, refused, tokens, write
from ranks import RankPool

from opt_megatron.data import indexed_dataset as indexed_files
from opt_megatron.data.options import DataOptions
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import ParallelContext


def test_samples_are_blocks_of_shuffled_documents_with_shifted_labels(tmp_path: Path, alone: ParallelContext) -> None:
    documents = counting(9, 7)
    prefix = write(tmp_path / "a", documents)
    train, valid = build(alone, DataOptions([prefix], split="1"), train=10)  # (9 * 7 - 1) // 6 = 10: one epoch
    assert valid is None and len(train) == 10
    seen = []
    for n in range(10):
        sample = train[n]
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert [value.dtype for value in sample.values()] == [torch.int64, torch.int64, torch.float32, torch.int64]
        assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
        assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]  # not reset where a document begins
        assert sample["loss_mask"].tolist() == [1.0] * 6
        seen += sample["tokens"].tolist()
    text = [token for document in documents for token in document]
    assert len(seen) == 60 and not set(seen) - set(text)
    assert len({token for token in seen if token != EOD}) == seen.__len__() - seen.count(EOD)  # each token once
    with pytest.raises(IndexError):
        train[10]


def test_the_order_follows_the_seed_and_is_the_same_from_the_cache(tmp_path: Path, alone: ParallelContext) -> None:
    options = DataOptions([write(tmp_path / "a", counting(9, 7))], split="1")
    first = tokens(build(alone, options, train=25)[0])  # two and a half epochs
    (cache,) = (tmp_path / "a" / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert tokens(build(alone, options, train=25)[0]) == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before and before
    assert tokens(build(alone, options, train=25, seed=2)[0]) != first


@pytest.mark.parametrize(("weights", "share"), [(("3", "1"), 0.75), (None, 0.2)])
def test_corpora_are_mixed_by_weight_or_else_by_their_tokens(
    tmp_path: Path, alone: ParallelContext, weights: tuple[str, str] | None, share: float
) -> None:
    a, b = write(tmp_path / "a", counting(6, 7)), write(tmp_path / "b", counting(24, 7, first=300))
    words = [a, b] if weights is None else [weights[0], a, weights[1], b]
    train, valid = build(alone, DataOptions(train_data_path=words, valid_data_path=[b]), train=200, valid=3)
    of_a = sum(max(sample) < 300 for sample in tokens(train))
    assert len(train) == 200 and of_a == pytest.approx(200 * share, abs=1)  # many epochs of both
    assert valid is not None and len(valid) == 3


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 99, 101, 109])
def test_small_blends_of_many_corpora_have_every_sample(tmp_path: Path, alone: ParallelContext, samples: int) -> None:
    # By its default margin core refuses 101 samples at such weights: ten roundings up fall to one corpus.
    words = [word for n in range(10) for word in ("91" if n == 0 else "1", write(tmp_path / f"{n}", counting(6, 7)))]
    train, _ = build(alone, DataOptions(train_data_path=words), train=samples)
    assert len(tokens(train)) == samples


def test_validation_on_several_corpora_passes_over_each_once(tmp_path: Path, alone: ParallelContext) -> None:
    a, b = write(tmp_path / "a", counting(3, 7)), write(tmp_path / "b", counting(6, 7, first=300))
    options = DataOptions(train_data_path=[a], valid_data_path=["9", a, "1", b])
    _, valid = build(alone, options, valid=None)
    assert valid is not None and len(valid) == 20 // 6 + 41 // 6


def test_padding_in_the_data_has_no_loss_and_stays_padding(tmp_path: Path, alone: ParallelContext) -> None:
    prefix = write(tmp_path / "a", [[1, 10, 11, 1, 12, 13, 1, 14, 15, 16, 17, 18, 2]])
    train, _ = build(alone, DataOptions([prefix], split="1"), train=2)
    for sample in (train[0], train[1], train[0]):
        assert torch.equal(sample["loss_mask"] == 0, sample["labels"] == 1)
    assert sum(sample.count(1) for sample in tokens(train)) == 3


def test_ranks_share_the_batches_and_fail_together(
    ranks: Callable[[int], RankPool], tmp_path: Path, alone: ParallelContext
) -> None:
    write(tmp_path / "a", counting(9, 7))
    write(tmp_path / "b", counting(9, 7, first=200))
    options = DataOptions(train_data_path=["2", str(tmp_path / "a"), "1", str(tmp_path / "b")])
    (whole,) = [digest_of_batches(options, 2)]
    two = ranks(2).run(digest_of_batches, options, 2)
    assert [two[0][n] + two[1][n] for n in range(2)] == whole
    missing = DataOptions([str(tmp_path / "none")])
    assert ranks(2).run(digest_of_batches, missing, 1) == [digest_of_batches(missing, 1)] * 2
    assert "none.idx: there is no such file" in digest_of_batches(missing, 1)


def test_too_little_text_and_foreign_tokens(tmp_path: Path, alone: ParallelContext) -> None:
    a = write(tmp_path / "a", counting(9, 7))
    message = refused(alone, DataOptions([a], split="8,1"), valid=1, seq_length=7)
    assert (
        "1 of 9 documents are for validation (--split 8,1), with 7 tokens, fewer than one sequence of 7 + 1" in message
    )
    assert "token id 63 is not in the model's vocabulary of 63" in refused(
        alone, DataOptions([a], split="1"), vocab_size=63
    )
    build(alone, DataOptions([a], split="1"), vocab_size=64)
    negative = write(tmp_path / "n", [[5, 6, 7, 8, 9, -4, 3, 2]], np.int32)
    assert "token id -4" in refused(alone, DataOptions([negative], split="1"))


def test_a_foreign_token_that_the_check_did_not_read_is_met_in_its_sample(
    tmp_path: Path, alone: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_files, "_SCAN_BLOCK", 16)
    monkeypatch.setattr(indexed_files, "_SCAN_BLOCKS", 1)
    prefix = write(tmp_path / "a", [[*range(10, 22), 501, *range(22, 30), 2]])
    train, _ = build(alone, DataOptions([prefix], split="1"), train=3, vocab_size=501)
    with pytest.raises(UserError, match="token id 501 is not in the model's vocabulary of 501"):
        tokens(train)
