"""Cached indices are used for the same files and options alone, and only when they are complete."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from indexed_corpora import EOD, build, counting, tokens, write

from opt_megatron.data.options import DataOptions
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import ParallelContext


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
    (half / "journal.jsonl").write_text('{"made_by": "opt_megatron"}\n')
    for path in half.glob("*.npy"):
        os.truncate(path, 20)
    assert tokens(build(alone, options)[0]) == expected
    assert half.is_dir()  # it could be another run's that is at work
    os.utime(half, (0, 0))
    build(alone, options, seed=5)
    assert not half.exists()


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
