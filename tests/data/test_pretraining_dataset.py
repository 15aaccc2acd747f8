"""Pre-training samples: what they contain, that their order is reproducible, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data_jobs import digest_of_batches
from ranks import RankPool

from opt_megatron.data import indexed_dataset as indexed_files
from opt_megatron.data.options import DataOptions
from opt_megatron.data.pretraining_dataset import PretrainingDataset, build_datasets
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import ParallelContext

EOD = 2


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """An indexed data set of these documents, by megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def counting(documents: int, length: int, first: int = 10) -> list[list[int]]:
    """Documents of consecutive numbers from `first` on, each ended by EOD."""
    return [[*range(n, n + length - 1), EOD] for n in range(first, first + documents * (length - 1), length - 1)]


def build(
    parallel: ParallelContext, options: DataOptions, train: int = 8, valid: int | None = 0, **overrides: int
) -> tuple[PretrainingDataset, PretrainingDataset | None]:
    values = {"seq_length": 6, "seed": 1, "vocab_size": 500} | overrides
    return build_datasets(options, parallel, num_train_samples=train, num_valid_samples=valid, **values)


def tokens(dataset: PretrainingDataset) -> list[list[int]]:
    return [dataset[n]["tokens"].tolist() for n in range(len(dataset))]


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


def test_data_written_anew_under_the_same_name_do_not_meet_old_indices(tmp_path: Path, alone: ParallelContext) -> None:
    options = DataOptions([write(tmp_path / "a", counting(40, 7))], split="1")
    build(alone, options)
    write(tmp_path / "a", counting(3, 20, first=400))
    train, _ = build(alone, options)  # core's own names for its files are the same as before
    assert min(min(sample) for sample in tokens(train)) == EOD
    assert min(token for sample in tokens(train) for token in sample if token != EOD) >= 400


def test_a_killed_run_leaves_no_index_that_is_taken_for_whole(
    tmp_path: Path, alone: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DataOptions([write(tmp_path / "a", counting(9, 7))], split="1", data_cache_path=str(tmp_path / "cache"))
    expected = tokens(build(alone, options)[0])
    (done,) = (tmp_path / "cache").iterdir()
    half = tmp_path / "cache" / ".building-killed"
    done.rename(half)  # as it is when the process dies before the directory gets its name
    for path in half.glob("*.npy"):
        os.truncate(path, 20)
    assert tokens(build(alone, options)[0]) == expected
    assert half.is_dir()  # it could be another run's that is at work
    os.utime(half, (0, 0))
    build(alone, options, seed=5)
    assert not half.exists()


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


def test_a_place_that_cannot_be_written_costs_only_the_cache(
    tmp_path: Path, alone: ParallelContext, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "a", counting(9, 7))
    (tmp_path / "a").write_text("a file where the cache directory would be")
    train, _ = build(alone, DataOptions([prefix], split="1"))
    assert "cannot be written" in capsys.readouterr().err
    assert len(tokens(train)) == 8  # the temporary directory is gone, what was read from it is not
    with pytest.raises(UserError, match=r"--data-cache-path .* cannot be written"):
        build(alone, DataOptions([prefix], split="1", data_cache_path=f"{prefix}/x"))


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


def refused(parallel: ParallelContext, options: DataOptions, **values: int) -> str:
    with pytest.raises(UserError) as caught:
        build(parallel, options, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


def test_files_that_are_missing_or_damaged(tmp_path: Path, alone: ParallelContext) -> None:
    prefix = write(tmp_path / "a_text_document", counting(9, 7))
    options = DataOptions([prefix], split="1")
    assert f"did you mean {prefix}?" in refused(alone, DataOptions([str(tmp_path / "a")]))
    assert f"did you mean {prefix}?" in refused(alone, DataOptions([f"{prefix}.bin"]))
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole_idx, whole_bin = idx.read_bytes(), bin_.read_bytes()
    length_of_first = whole_idx[34] + 1
    for damaged, words in (
        (b"", "is no index of Megatron's format"),
        (b"XX" + whole_idx[2:], "is no index of Megatron's format"),
        (whole_idx[:9] + b"\2" + whole_idx[10:], "version 2 "),
        (whole_idx[:17] + b"\7" + whole_idx[18:], "dtype code 7 "),
        (whole_idx[:-8], "it is damaged"),
        (whole_idx[:34] + bytes([length_of_first]) + whole_idx[35:], "contradict each other"),
        (whole_idx[:-8] + b"\1" + whole_idx[-7:], "last document does not end"),
    ):
        idx.write_bytes(damaged)
        assert words in refused(alone, options)
    idx.write_bytes(whole_idx)
    bin_.write_bytes(whole_bin[:-2])
    assert "has 124 bytes, but its index tells of 126" in refused(alone, options)
    bin_.write_bytes(whole_bin)
    build(alone, options)
    bin_.unlink()
    assert "a_text_document.bin: there is no such file" in refused(alone, options)
