"""Compression of checkpoints at several layouts, interrupted and resumed, and what it writes."""

import hashlib
import json

import compression_jobs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTForCausalLM

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY

GPTQ = [{"quantize": {"bits": 3, "group_size": 32}}]
SPARSEGPT = [{"smooth": {"alpha": 0.5}}, {"prune": {"sparsity": 0.5}}, {"quantize": {"bits": 4}}]
WANDA = [{"prune": {"method": "wanda", "pattern": "2:4"}}]
MAGNITUDE = [{"prune": {"method": "magnitude", "sparsity": 0.6}}]


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """JSON lines with 8 windows of 32 ids."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("windows") / "windows.jsonl"
    lines = [json.dumps({"tokens": torch.randint(4, 500, (32,), generator=generator).tolist()}) for _ in range(8)]
    path.write_text("\n".join(lines) + "\n")
    return path


def linears(directory):
    """The weights of the linears."""
    tensors = load_file(directory / "model.safetensors")
    return {n: t for n, t in tensors.items() if ".layers." in n and n.endswith("weight") and "norm" not in n}


@pytest.mark.parametrize(
    ("name", "recipe", "share", "layouts"),
    [
        ("four_layers", SPARSEGPT, 0.5, ((2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2))),
        ("post_norm", SPARSEGPT, 0.5, ((4, 2, 2),)),
        ("four_layers", GPTQ, None, ((2, 2, 1),)),
        ("four_layers", WANDA, 0.5, ((2, 2, 1),)),
        ("four_layers", MAGNITUDE, 0.6, ((2, 2, 1),)),
    ],
)
def test_every_layout_gives_the_same(request, ranks, windows, tmp_path, name, recipe, share, layouts):
    """Layouts are ranks, of which tensor and pipeline parallel; the others are data parallel."""
    directory = request.getfixturevalue(name)
    reports = {}
    for world, tp, pp in ((1, 1, 1), *layouts):
        target = tmp_path / f"{world}-{tp}-{pp}"
        every = ranks(world).run(compression_jobs.compressed, directory, tp, pp, target, recipe, windows, {})
        assert all(report == every[0] for report in every)
        reports[target] = every[0]
    first, *others = map(linears, reports)
    for other in others:
        differing = sum(int((first[n] != other[n]).sum()) for n in first)
        assert differing <= 1e-4 * sum(t.numel() for t in first.values())
    zeros = [report.zeros for report in reports.values()]
    assert zeros == pytest.approx([zeros[0]] * len(zeros), abs=1e-5)
    assert share is None or zeros[0] == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_layers_are_transformers(models, ranks, name, tp):
    directory, oracle = models[name]
    tokens = torch.arange(4, 44)
    with torch.no_grad():
        expected = oracle(tokens[None], output_hidden_states=True).hidden_states
    for states in ranks(tp).run(compression_jobs.hidden_states, directory, tp, tokens):
        for state, wanted in zip(states[:-1], expected[:-1], strict=True):
            assert (state - wanted[0]).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["four_layers", "post_norm"])
def test_smoothing_keeps_the_function(request, ranks, windows, tmp_path, name):
    directory = request.getfixturevalue(name)
    ranks(2).run(compression_jobs.compressed, directory, 2, 1, tmp_path / "a", [{"smooth": {}}], windows, {})
    tokens = torch.arange(4, 44)[None]
    with torch.no_grad():
        before, after = (
            OPTForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (directory, tmp_path / "a")
        )
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()
    old, new = linears(directory), linears(tmp_path / "a")
    assert sum(not torch.equal(old[n], new[n]) for n in old) == 16


@pytest.mark.parametrize("layouts", [((1, 1), (2, 1)), ((2, 2), (1, 2))])
def test_interrupted_runs_are_resumed(four_layers, ranks, windows, tmp_path, layouts):
    recipe = SPARSEGPT
    ranks(1).run(compression_jobs.compressed, four_layers, 1, 1, tmp_path / "whole", recipe, windows, {})
    (tp, pp), (other_tp, other_pp) = layouts
    target = tmp_path / "resumed"
    ranks(tp * pp).run(compression_jobs.interrupted, four_layers, tp, pp, target, recipe, windows, 3)
    assert not target.exists()
    report = ranks(other_tp * other_pp).run(
        compression_jobs.compressed, four_layers, other_tp, other_pp, target, recipe, windows, {"resume": True}
    )[0]
    assert not report.notes and [layer.layer for layer in report.layers] == [0, 1, 2, 3]
    whole, resumed = linears(tmp_path / "whole"), linears(target)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list(tmp_path.glob(".*"))


def test_what_is_written(ranks, windows, tmp_path):
    target = tmp_path / "out"
    options = {"dtype": "float32"}
    ranks(1).run(compression_jobs.compressed, EMBEDDED_DIRECTORY, 1, 1, target, "gptq4-g128", windows, options)
    names = {path.name for path in target.iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "opt_megatron_manifest.json"}
    assert names >= {"compression_report.json", "compression_report.md", "compression_report.png"}
    ids = [json.loads(line)["tokens"] for line in windows.read_text().splitlines()]
    manifest = json.loads((target / "opt_megatron_manifest.json").read_text())["options"]
    assert manifest["recipe"][0]["quantize"]["group_size"] == 128
    assert manifest["calibration"]["sha256"] == hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
    assert (manifest["calibration"]["samples"], manifest["calibration"]["seed"]) == (8, 0)
    weight = linears(target)["model.decoder.layers.0.fc2.weight"]
    assert all(len(row.unique()) <= 16 for row in weight[:, :128])
    report = json.loads((target / "compression_report.json").read_text())
    assert report["layers"][0]["linears"][0]["name"] == "self_attn.k_proj"
    assert 0 < report["layers"][0]["firing"] < 1 and all(x["error"] > 0 for x in report["layers"][3]["linears"])
    again = ranks(1).run(compression_jobs.message_of, EMBEDDED_DIRECTORY, 1, 1, target, "int8", windows, {})[0]
    assert again.endswith("is a checkpoint already; --force replaces it")


def broken(directory, target, value):
    """A copy of a model with one weight of its layer 1 replaced."""
    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[3] = value
    model.save_pretrained(target)
    return target


def test_mistakes_are_the_same_sentence_on_every_rank(four_layers, ranks, windows, tmp_path):
    def messages(directory, recipe, data=windows, options=None, layout=(2, 2)):
        tp, pp = layout
        target = tmp_path / "out"
        found = ranks(4).run(compression_jobs.message_of, directory, tp, pp, target, recipe, data, options or {})
        assert len(set(found)) == 1 and not target.exists() and not list(tmp_path.glob(".out*"))
        return found[0]

    nan = broken(four_layers, tmp_path / "nan", torch.nan)
    large = broken(four_layers, tmp_path / "large", 1e6)
    assert "layer 1, fc2: 1 of its 96 inputs are not finite" in messages(nan, GPTQ)
    message = messages(large, MAGNITUDE, options={"dtype": "float16"})
    assert "layer 1, fc1.bias: holds 1e+06, which float16 cannot: give --dtype bfloat16 or float32" in message
    assert "none.txt: cannot be read: No such file" in messages(four_layers, GPTQ, tmp_path / "none.txt")
