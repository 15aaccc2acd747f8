"""Files and directories appear complete or not at all, and failures leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_megatron.errors import UserError
from opt_megatron.files import (
    atomic_file,
    created_directory,
    write_text_atomically,
)


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with atomic_file(path, fsync=True) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_removes_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/x: cannot be written: No such file or directory"):
        write_text_atomically(tmp_path / "none" / "x", "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: cannot be written: Not a directory"):
        write_text_atomically(tmp_path / "file" / "x", "text")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("old")
    for name in ("x", ".x.partial"):
        (tmp_path / name).symlink_to("victim")
    write_text_atomically(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "old" and (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink() and (tmp_path / ".x.partial").is_symlink()


def test_created_directories_are_removed_while_they_are_empty(tmp_path: Path) -> None:
    with created_directory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with created_directory(tmp_path / "a" / "b"):
        (tmp_path / "a" / "x").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    (tmp_path / "empty").mkdir()
    with created_directory(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()
