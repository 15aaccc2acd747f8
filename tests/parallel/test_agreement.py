"""Ranks that see other files or have other options are told so before anything is computed."""

from __future__ import annotations

import shutil

import pytest
import rank_jobs
import training_jobs
from checkpoint_samples import megatron
from factory import random_model, save
from safetensors.torch import load_file, save_file

from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.parallel.agreement import first_difference


def test_the_first_difference_is_told_with_the_number_of_others():
    same = {"rank 0": {"a": 1}, "rank 1": {"a": 1}}
    assert first_difference(same) is None
    told = first_difference({**same, "rank 2 (/x)": {"a": 2, "b": "x\n" * 100}})
    assert told.startswith("rank 2 (/x) has a 2, rank 0 1 (and 1 more)")
    assert "\n" not in first_difference({"rank 0": {}, "rank 1": {"b": "x\n" * 100}})


LAYOUTS = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (LAYOUTS, "tensor_model_parallel_size 1, rank 0 2 (and 1 more)"),
        (({"seed": 1}, {"seed": 2}), "seed 2, rank 0 1"),
        (({}, {"options": {"--context": 7}}), "--context 7, rank 0 None"),
    ],
)
def test_arguments(ranks, arguments, message):
    texts = ranks(2).run(rank_jobs.start_with_own_arguments, arguments)
    assert texts == [f"rank 1 has {message}: start all ranks with the same model, data and options"] * 2


def changed(target, name="model.safetensors", **tensors):
    """A copy of the embedded model with other tensors."""
    shutil.copytree(EMBEDDED_DIRECTORY, target)
    save_file({**load_file(target / name), **tensors}, target / name)
    return target


def test_checkpoints(ranks, tmp_path):
    norm = "model.decoder.final_layer_norm.weight"
    stored = load_file(EMBEDDED_DIRECTORY / "model.safetensors")
    convert(EMBEDDED_DIRECTORY, tmp_path / "same", megatron(2))
    changed(tmp_path / "other", **{norm: stored[norm] * 0.5})
    changed(tmp_path / "tokens")
    vocabulary = tmp_path / "tokens" / "vocab.json"
    vocabulary.write_text(vocabulary.read_text().replace('"!"', '"~~"').replace('"~"', '"!"').replace('"~~"', '"~"'))
    small = save(random_model(), tmp_path / "small")

    def told(other, **options):
        texts = ranks(2).run(rank_jobs.open_own_checkpoint, [EMBEDDED_DIRECTORY, other], [{}, options])
        assert texts[0] == texts[1]
        return texts[0]

    assert told(tmp_path / "same") == ""  # a copy of other format elsewhere
    assert f"rank 1 ({tmp_path / 'other'}) has {norm} [256] torch.float16, values" in told(tmp_path / "other")
    assert f"rank 1 ({small}) has num_layers 12, rank 0 ({EMBEDDED_DIRECTORY}) 4" in told(small)
    assert "rank 1 has tokenizer" in told(tmp_path / "tokens")
    assert "rank 1 has dtype bfloat16, rank 0 auto" in told(EMBEDDED_DIRECTORY, dtype="bfloat16")
    assert "no such directory" in told(tmp_path / "none") and "(on rank 1)" in told(tmp_path / "none")


def test_training(ranks, corpus, tmp_path):
    pairs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, word in zip(pairs, ("king", "wolf"), strict=True):
        path.write_text(f'{{"src": "Once", "tgt": " the {word}"}}\n')
    saved = tmp_path / "run" / "iter_0000003"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text("{}")
    arguments = EMBEDDED_DIRECTORY, corpus, [str(path) for path in pairs], saved.parent
    for own in ranks(2).run(training_jobs.runs_that_differ, *arguments):
        assert own["options"].startswith("rank 1 has lr 0.006, rank 0 0.003")
        assert f"rank 1 has {corpus}.bin content of rank 1, rank 0 content of rank 0" in own["data"]
        assert own["supervised"].startswith("rank 1 has examples of --supervised-data")
        assert f"rank 1 ({saved}) has iter_0000003/manifest.json content of rank 1" in own["saved"]
