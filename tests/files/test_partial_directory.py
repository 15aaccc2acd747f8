"""A partial directory is published, removed, or kept for a later run to resume (see also test_convert.py)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from opt_megatron.errors import UserError
from opt_megatron.files import PartialDirectory


def test_it_appears_when_it_is_published_and_else_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x"
    with PartialDirectory(target) as partial:
        (partial.path / "file").write_text("content")
        assert not target.exists()
    assert not list(tmp_path.iterdir())
    with PartialDirectory(target, fsync=True) as partial:
        (partial.path / "file").write_text("content")
        partial.publish()
    assert [path.name for path in target.iterdir()] == ["file"] and list(target.parent.iterdir()) == [target]


def test_a_directory_with_content_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_text("")
    message = "x: cannot be written: Directory not empty; nothing was left there"
    with pytest.raises(UserError, match=message), PartialDirectory(target) as partial:
        partial.publish()
    with PartialDirectory(target) as partial:
        partial.publish(replace=True)
    assert list(target.iterdir()) == [] and list(tmp_path.iterdir()) == [target]


def test_an_interrupted_run_is_resumed_if_its_fingerprint_is_the_same(tmp_path: Path) -> None:
    def interrupted_run() -> None:
        with pytest.raises(KeyboardInterrupt), PartialDirectory(tmp_path / "x", {"source": "a"}) as partial:
            (partial.path / "file").write_text("content")
            partial.record("tensor", "hash", 7)
            raise KeyboardInterrupt

    interrupted_run()
    with PartialDirectory(tmp_path / "x", {"source": "a"}, resume=True) as partial:
        assert (partial.done, partial.restarted) == ({"tensor": "hash"}, False)
        assert (partial.path / "file").read_text() == "content"
    interrupted_run()
    with PartialDirectory(tmp_path / "x", {"source": "b"}, resume=True) as partial:
        assert (partial.done, partial.restarted) == ({}, True)
        assert not (partial.path / "file").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_is_finished_stays_where_the_disk_is_full(tmp_path: Path, number: int) -> None:
    message = rf"{os.strerror(number)}; what is finished stays in .*\.x\.partial: make room, and go on with --resume"
    with pytest.raises(UserError, match=message), PartialDirectory(tmp_path / "x", {}) as partial:
        partial.record("tensor", "hash", 7)
        raise OSError(number, os.strerror(number))
    with (tmp_path / ".x.partial" / "journal.jsonl").open("a") as journal:
        journal.write('{"name": "half of a li')
    with PartialDirectory(tmp_path / "x", {}, resume=True) as partial:
        partial.record("another", "hash", 7)
        assert partial.done.keys() == {"tensor", "another"}
        with pytest.raises(UserError, match="another process is writing it"), PartialDirectory(tmp_path / "x"):
            pass
        partial.publish()
    with pytest.raises(UserError, match="nothing was left"), PartialDirectory(tmp_path / "y") as partial:
        raise OSError(number, os.strerror(number))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
