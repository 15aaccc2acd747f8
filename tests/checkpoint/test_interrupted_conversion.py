"""Conversions that are interrupted at any moment, and continued."""

import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
from checkpoint_samples import assert_same, contents, megatron
from formats import hf_config, random_tensors, write_hf

from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.manifest import read_manifest

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")  # audit events


def run_in_a_fork(action: Callable[[], None], last: int | None = None) -> int:
    """Run the action in another process, which ends before its call number `last` that may change a file.

    Returns:
        the number of these calls that the action made.
    """
    counts = multiprocessing.get_context("fork").Value("i", 0)

    def count() -> None:
        counts.value += 1
        if counts.value == last:
            os._exit(9)  # as a kill does: nothing is cleaned up

    def pwrite(*arguments: Any) -> int:
        count()
        return real_pwrite(*arguments)

    real_pwrite, process = os.pwrite, os.fork()
    if process:
        os.waitpid(process, 0)
        return counts.value
    try:
        sys.addaudithook(lambda event, _: count() if event in CHANGES else None)
        os.pwrite = pwrite
        action()
    finally:
        os._exit(0)


def test_killed_at_any_moment_the_target_is_absent_or_whole(tmp_path):
    config = hf_config()
    expected = random_tensors(config)
    source, target, partial = write_hf(tmp_path / "source", config, expected), tmp_path / "c", tmp_path / ".c.partial"

    def run(**options: bool) -> None:
        convert(source, target, megatron(2), workers=1, fsync=False, force=True, **options)

    calls = run_in_a_fork(run)
    assert_same(contents(target), expected)
    shutil.rmtree(target)
    seen = set()
    # The last calls publish the directory.
    for number, last in enumerate(sorted({0, *random.Random(7).sample(range(calls), 12), *range(calls - 10, calls)})):
        run_in_a_fork(run, last + 1)
        seen.add("partial" if partial.exists() else "whole" if target.exists() else "absent")
        if target.exists():
            assert not partial.exists()
            assert_same(contents(target), expected)
        run(resume=bool(number % 2))
        assert_same(contents(target), expected)
        assert {path.name for path in tmp_path.iterdir()} == {"source", "c"}
        shutil.rmtree(target)
    assert seen == {"absent", "partial", "whole"}


def test_resume_goes_on_from_what_is_complete(tmp_path, monkeypatch):
    from opt_megatron.checkpoint import convert as module

    config = hf_config(num_hidden_layers=4)
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    written = []

    def interrupt(num_bytes):
        written.append(num_bytes)
        if len(written) == 20:
            raise KeyboardInterrupt

    def run(**options):
        return convert(tmp_path / "source", tmp_path / "c", megatron(2), workers=1, fsync=False, **options)

    with pytest.raises(KeyboardInterrupt):
        run(progress=interrupt)
    assert not (tmp_path / "c").exists() and (tmp_path / ".c.partial").exists()
    copied, write_tensors = [], module.write_tensors

    def watched(*arguments, **options):
        copied.append(len(options["done"]))
        write_tensors(*arguments, **options)

    monkeypatch.setattr(module, "write_tensors", watched)
    run(resume=True)
    assert 0 < copied[0] < len(tensors)
    assert_same(tensors, contents(tmp_path / "c"))
    assert read_manifest(tmp_path / "c").tensors.keys() == tensors.keys()


def test_resume_trusts_nothing_when_a_file_is_gone(tmp_path):
    config = hf_config(num_hidden_layers=4)
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    written = []

    def interrupt(num_bytes):
        written.append(num_bytes)
        if len(written) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "c", megatron(2), workers=1, fsync=False, progress=interrupt)
    (tmp_path / ".c.partial" / "release" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    convert(tmp_path / "source", tmp_path / "c", megatron(2), fsync=False, resume=True)
    assert_same(tensors, contents(tmp_path / "c"))


def test_resume_starts_anew_when_the_source_has_changed(tmp_path):
    config = hf_config()
    write_hf(tmp_path / "source", config, random_tensors(config))

    def interrupt(num_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "c", megatron(2), fsync=False, progress=interrupt)
    other = random_tensors(config, seed=5)
    write_hf(tmp_path / "source", config, other)
    summary = convert(tmp_path / "source", tmp_path / "c", megatron(2), fsync=False, resume=True)
    assert_same(other, contents(tmp_path / "c"))
    assert "it began anew" in summary.notes[0]
