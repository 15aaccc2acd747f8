"""The target of a conversion: nothing else is overwritten, and it is complete or absent."""

import os
import resource
import shutil

import pytest
import torch
from checkpoint_samples import assert_same, contents, megatron
from formats import hf_config, random_tensors, write_flagai

from opt_megatron.checkpoint.conversion_options import ConversionOptions
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
    with pytest.raises(UserError, match=r"holds thesis\.txt, x\.pt and is no checkpoint alone.* left alone"):
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


@pytest.mark.parametrize("to", ["megatron", "hf", "metaseq", "flagai"])
@pytest.mark.parametrize("name", ["my.pt", "release/thesis.txt", "release/a/my.pt", "x/config.json", "x"])
def test_force_sees_what_is_not_the_formats_at_any_depth(tmp_path, to, name):
    options = ConversionOptions(to)
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", options, fsync=False)
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", options, fsync=False, force=True)
    (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "x":
        (tmp_path / "c" / name).symlink_to(tmp_path)
    else:
        (tmp_path / "c" / name).write_text("years of work")
    with pytest.raises(UserError, match=f"holds {name} and is no checkpoint alone"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", options, fsync=False, force=True)
    assert os.path.lexists(tmp_path / "c" / name)


@pytest.mark.parametrize("link", [True, False])
def test_a_users_directory_under_the_temporary_name_is_refused(tmp_path, link):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("years of work")
    partial = tmp_path / ".c.partial"
    partial.symlink_to("victim") if link else (tmp_path / "victim").rename(partial)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"\.c\.partial: is .* not made by this program"):
            convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), resume=resume)
    assert os.listdir(partial) == ["thesis.txt"]


def test_what_a_full_disk_has_interrupted_is_resumed(tmp_path):
    """A limit on file size simulates a full disk: writing fails in the same way at the same point."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(UserError, match=r"cannot be written: File too large; what is finished stays in .*--resume"):
            convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), fsync=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [".c.partial"]
    summary = convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), fsync=False, resume=True)
    assert os.listdir(tmp_path) == ["c"] and not any("anew" in note for note in summary.notes)
    assert_same(contents(tmp_path / "c"), contents(EMBEDDED_DIRECTORY))


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
