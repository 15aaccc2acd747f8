"""The target of a conversion: nothing else is overwritten, and it is complete or absent."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoint_samples import assert_same, contents, megatron
from formats import hf_config, random_tensors, write_flagai

from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.errors import CheckpointError, UserError


def test_nothing_is_overwritten_without_force(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1))
    with pytest.raises(UserError, match="--force replaces it"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), force=True)
    assert len(list((tmp_path / "c" / "release").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # the former one is gone, nothing is left beside


def test_force_never_removes_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "x.pt").touch()
    with pytest.raises(UserError, match=r"holds thesis\.txt .* left alone"):
        convert(EMBEDDED_DIRECTORY, tmp_path, megatron(1), force=True)
    copy = tmp_path / "copy"
    shutil.copytree(EMBEDDED_DIRECTORY, copy)
    for target in (copy, tmp_path):
        with pytest.raises(UserError, match="is the source or holds it"):
            convert(copy, target, megatron(1), force=True)


def test_damage_found_half_way_leaves_nothing_behind(tmp_path):
    config = hf_config()
    write_flagai(tmp_path / "source", config, random_tensors(config), 2)
    path = tmp_path / "source" / "pytorch_model_01.bin"
    content = torch.load(path)
    content["module"]["model.decoder.layers.1.fc2.bias"] += 1  # replicated, so it must be the same in both parts
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc2\.bias is not the same in parts 0 and 1"):
        convert(tmp_path / "source", tmp_path / "c", megatron(2))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on file size simulates a full disk: writing fails in the same way at the same point."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000));"
        "from opt_megatron.cli import main; main(['convert', '--load', 'story', '--save', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("opt-megatron: error: ") and "cannot be written: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_conversions_to_one_target_do_not_mix(tmp_path, monkeypatch):
    """The second is refused up to the very end of the first, when the journal is gone and the disk is waited for."""
    from opt_megatron.files import partial_directory

    refused, fsync_path = [], partial_directory.fsync_path

    def fsync_while_another_starts(path):
        monkeypatch.setattr(partial_directory, "fsync_path", fsync_path)
        with pytest.raises(UserError, match="another process is writing it"):
            convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1))
        refused.append(path)
        fsync_path(path)

    monkeypatch.setattr(partial_directory, "fsync_path", fsync_while_another_starts)
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    assert len(refused) == 1
    assert_same(contents(tmp_path / "c"), contents(EMBEDDED_DIRECTORY))


def test_a_run_killed_between_two_renames_gives_the_old_one_its_name_back(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), fsync=False)
    (tmp_path / "c").rename(tmp_path / ".c.replaced")
    with pytest.raises(UserError, match="--force replaces it"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    assert_same(contents(tmp_path / "c"), contents(EMBEDDED_DIRECTORY))


def test_links_are_followed_and_other_kinds_of_file_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "link", "dangling"):
        convert(EMBEDDED_DIRECTORY, tmp_path / name, megatron(1), force=True, fsync=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "release").is_dir()
    assert (tmp_path / "made" / "release").is_dir()
    for name, message in (("loop", "no path that can be written"), ("fifo", "is not a directory")):
        with pytest.raises(UserError, match=message):
            convert(EMBEDDED_DIRECTORY, tmp_path / name, megatron(1), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "dangling", "loop", "fifo", "made"}
