"""Weights as whole tensors: read, written and saved at every layout, before and after generating."""

import api_jobs
import pytest
import torch
from safetensors.torch import load_file

from opt_megatron import OPT
from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.errors import UserError

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
FC1 = "model.decoder.layers.0.fc1.weight"


def content(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(four_layers, post_norm, tmp_path_factory):
    """Name -> directory. The weights of the last stay in 16 bits, and edited ones must not be rounded to them."""
    half = tmp_path_factory.mktemp("half") / "model"
    convert(four_layers, half, ConversionOptions("hf", dtype="float16"))
    return {"pre-norm": four_layers, "post-norm": post_norm, "half": half}


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "half"])
def test_every_tensor_is_the_checkpoints_on_every_rank_also_when_packed(models, ranks, name, tp, pp):
    directory = models[name]
    stored = load_file(directory / "model.safetensors")
    for before, after in ranks(tp * pp).run(api_jobs.weights_before_and_after_generating, directory, tp, pp):
        for found in (before, after):
            assert found.keys() == stored.keys() | {"lm_head.weight"}
            assert torch.equal(found.pop("lm_head.weight"), stored["model.decoder.embed_tokens.weight"].float())
            for key, tensor in found.items():
                assert torch.equal(tensor, stored[key].float()), key


@pytest.mark.parametrize("generate_first", [False, True])
def test_pruned_checkpoints_are_the_same_bytes_at_every_layout(models, ranks, tmp_path, generate_first):
    directory = models["pre-norm"]
    saved = {}
    for tp, pp in LAYOUTS:
        target = tmp_path / f"{tp}x{pp}"
        ranks(tp * pp).run(api_jobs.pruned, directory, tp, pp, target, generate_first)
        saved[tp, pp] = content(target)
    assert "opt_megatron_manifest.json" in saved[1, 1] and all(saved[1, 1] == other for other in saved.values())
    weight = load_file(tmp_path / "1x1" / "model.safetensors")[FC1]
    assert (weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("name", ["pre-norm", "post-norm", "half"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_what_is_written_is_what_runs_afterwards(models, ranks, tmp_path, name, tp, pp):
    """Tensors written before and after packing: the same logits and tokens as a checkpoint with them, loaded anew."""
    for same in ranks(tp * pp).run(api_jobs.edited_and_reloaded, models[name], tp, pp, tmp_path / "saved"):
        assert same == {"weights": True, "logits": True, "tokens": True}


def test_saved_in_other_formats_they_are_the_same_weights(models, ranks, tmp_path):
    directory = models["pre-norm"]
    options = {"to": "megatron", "pipeline_model_parallel_size": 4}
    ranks(2).run(api_jobs.saved, directory, 2, tmp_path / "megatron", options)
    ranks(1).run(api_jobs.saved, tmp_path / "megatron", 1, tmp_path / "hf", {})
    stored, back = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "hf"))
    assert stored.keys() == back.keys() and all(torch.equal(stored[name], back[name]) for name in stored)


def test_mistakes_are_one_line_on_every_rank_and_change_nothing(models, ranks, tmp_path):
    first, second = ranks(2).run(api_jobs.weight_errors, models["pre-norm"], 2, tmp_path)
    assert first == second
    for message, part in zip(
        first,
        (
            "there is no weight 'model.decoder.layers.0.fc1.weigth'; there are model.decoder.layers.0.fc1.weight, ",
            "there is no weight 'layer'; there are ",
            "fc1.weight must be a tensor [96, 48], not float",
            "fc1.weight has the shape [96, 48], but was given [48, 96]",
            "fc1.weight must be of floating-point numbers, not torch.int64",
            "fc1.weight: 1 of the values are not finite in torch.float32",
            "rank 1 writes other values than rank 0",
            "is a checkpoint already",
            "--to nonsense is not one of",
        ),
        strict=True,
    ):
        assert part in message


def test_quantised_weights_are_refused_in_a_sentence_and_others_are_not(alone, tmp_path):
    opt = OPT.from_pretrained(quantization="int8")
    for action in (
        lambda: opt.weights[FC1],
        lambda: opt.weights["lm_head.weight"],
        lambda: opt.save(tmp_path / "x"),
    ):
        with pytest.raises(UserError, match="is quantised to int8, and its float values were not kept: load the model"):
            action()
    with pytest.raises(UserError, match="load the model without quantization"):
        opt.weights[FC1] = torch.zeros(opt.weights.shape(FC1))
    name = FC1.replace("weight", "bias")
    opt.weights[name] = opt.weights[name] + 1
    assert not list(tmp_path.iterdir())


def test_what_has_no_values_or_is_sparse_is_refused(alone):
    weights = OPT.from_pretrained().weights
    before = weights[FC1]
    for value, kind in ((before.to("meta"), "without values"), (before.to_sparse(), "sparse_coo")):
        with pytest.raises(UserError, match=f"must be a dense tensor, not one that is {kind}"):
            weights[FC1] = value
    assert torch.equal(weights[FC1], before)


@pytest.mark.parametrize("to", ["megatron", "metaseq", "flagai"])
def test_parts_whose_edited_matrix_has_equal_slices_are_read_back(alone, tmp_path, monkeypatch, to):
    monkeypatch.setenv("HOME", str(tmp_path))
    opt = OPT.from_pretrained()
    opt.weights[FC1] = torch.ones(opt.weights.shape(FC1))
    opt.save("~/saved", to=to, tensor_model_parallel_size=2)
    back = OPT.from_pretrained(str(tmp_path / "saved")).weights
    assert all(torch.equal(back[name], opt.weights[name]) for name in opt.weights)


def test_it_is_a_mapping(alone):
    weights = OPT.from_pretrained().weights
    assert weights == weights and weights != dict(weights) and "tensors, torch.float32" in repr(weights)
    assert len(weights) == len(list(weights)) == len(weights.keys()) and FC1 in weights and "lm_head.weight" in weights
    assert "nose" not in weights and weights.get("nose") is None and 3 not in weights
    assert next(iter(weights)) == "model.decoder.embed_tokens.weight"
    assert weights[FC1].shape == weights.shape(FC1) and weights[FC1] is not weights[FC1]
