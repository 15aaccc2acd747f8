"""Only regular files of a bounded size are read."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from opt_megatron.files import open_input, open_regular, read_text


@pytest.mark.timeout(10)
def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    cases = {tmp_path / "fifo": "a named pipe", tmp_path / "link": "a named pipe", tmp_path: "a directory"}
    for path, kind in {**cases, Path("/dev/zero"): "a device"}.items():
        with pytest.raises(OSError, match=f"is {kind}.*, not a regular file"):
            open_regular(path)


@pytest.mark.timeout(10)
def test_a_pipe_that_is_open_already_is_an_input(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    with open_input(f"/dev/fd/{reader}") as file:
        assert file.read() == b"text"
    os.close(reader)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="is a named pipe"):
        open_input(tmp_path / "fifo")


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("é" * 50)
    (tmp_path / "link").symlink_to("x")
    assert read_text(tmp_path / "link", 100) == "é" * 50
    with pytest.raises(OSError, match="has 100 bytes, more than the 99 that such a file may have"):
        read_text(tmp_path / "x", 99)


def test_more_files_are_opened_than_the_limit_of_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [open_regular(tmp_path / "x")]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 3, hard))
        opened += [open_regular(tmp_path / "x") for _ in range(8)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)
    assert len(set(opened)) == 9
