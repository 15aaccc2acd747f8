"""Conversions that are interrupted at any moment, and continued."""

import random
import shutil
import subprocess
import sys
import time

import pytest
from checkpoint_samples import assert_same, contents, megatron
from formats import hf_config, random_tensors, write_hf

from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.manifest import read_manifest


def start_conversion(target) -> subprocess.Popen:
    command = [sys.executable, "-m", "opt_megatron", "convert", "--load", str(target.parent / "source")]
    command += ["--save", str(target), "--tensor-model-parallel-size", "2", "--no-fsync"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def larger_source(tmp_path_factory):
    """A model of 160 MB, large enough that a process can be killed while it is being converted."""
    place = tmp_path_factory.mktemp("larger")
    config = hf_config(
        vocab_size=16384,
        hidden_size=512,
        num_attention_heads=8,
        num_hidden_layers=20,
        ffn_dim=2048,
        word_embed_proj_dim=512,
    )
    return write_hf(place / "source", config, random_tensors(config))


def test_killed_at_any_moment_the_target_is_absent_or_whole(larger_source):
    place = larger_source.parent
    expected = contents(larger_source)
    assert start_conversion(place / "whole").wait() == 0
    moments, seen = random.Random(7), set()
    for number in range(20):
        target = place / f"killed{number}"
        process = start_conversion(target)
        # Most of the time goes into starting Python and torch; wait for the moment at which writing begins.
        partial_directory = place / f".{target.name}.partial"
        while process.poll() is None and not partial_directory.exists():
            time.sleep(0.001)
        time.sleep(0.3 * moments.random() if number else 0)
        process.kill()
        process.communicate()
        partial = partial_directory.exists()
        seen.add("partial" if partial else "whole" if target.exists() else "absent")
        if target.exists():
            assert not partial
            assert_same(contents(target), expected)
        convert(larger_source, target, megatron(2), force=True, resume=bool(number % 2), fsync=False)
        assert_same(contents(target), expected)
        shutil.rmtree(target)
    assert "partial" in seen  # some were killed in the middle of writing
    assert {path.name for path in place.iterdir()} == {"source", "whole"}


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
