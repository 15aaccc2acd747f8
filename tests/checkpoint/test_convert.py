"""Conversion: no bit is lost between any two formats."""

import json
import shutil

import pytest
import torch
from checkpoint_samples import assert_same, contents, megatron
from formats import POST_NORM, hf_config, random_tensors, write_hf, write_metaseq_flat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError, UserError

TARGETS = [
    megatron(2, 2),
    megatron(4),
    ConversionOptions(to="hf"),
    ConversionOptions(to="hf", max_shard_size=1500),
    ConversionOptions(to="metaseq"),
    ConversionOptions(to="metaseq", tensor_model_parallel_size=4),
    ConversionOptions(to="flagai"),
    ConversionOptions(to="flagai", tensor_model_parallel_size=2),
]


@pytest.mark.parametrize("second", TARGETS, ids=lambda o: f"{o.to}{o.tensor_model_parallel_size}")
@pytest.mark.parametrize("first", TARGETS, ids=lambda o: f"{o.to}{o.tensor_model_parallel_size}")
def test_from_any_format_to_any_other(tmp_path, first, second):
    config = hf_config()
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "first", first, fsync=False)
    convert(tmp_path / "first", tmp_path / "second", second, fsync=False)
    assert_same(tensors, contents(tmp_path / "second"))
    assert open_checkpoint(tmp_path / "second").config == OPTConfig.from_hf(config)


@pytest.mark.parametrize("target", TARGETS, ids=lambda o: f"{o.to}{o.tensor_model_parallel_size}")
def test_post_norm_to_every_format_that_has_it(tmp_path, target):
    config = hf_config(**POST_NORM)
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    if target.to == "metaseq" and target.tensor_model_parallel_size > 1:
        with pytest.raises(UserError, match="as one file only"):
            convert(tmp_path / "source", tmp_path / "target", target)
        return
    convert(tmp_path / "source", tmp_path / "target", target, fsync=False)
    assert_same(tensors, contents(tmp_path / "target"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_round_trips_of_random_models_lose_nothing(tmp_path_factory, data):
    draw = data.draw
    heads, head_dim = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    layers, hidden = draw(st.integers(1, 5)), heads * head_dim
    post_norm = draw(st.booleans())
    config = hf_config(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        ffn_dim=draw(st.integers(1, 30)),
        max_position_embeddings=draw(st.integers(1, 9)),
        word_embed_proj_dim=draw(st.integers(1, 9)) if post_norm else hidden,
        do_layer_norm_before=not post_norm,
    )
    ours = OPTConfig.from_hf(config)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    tensors = random_tensors(config, draw(st.integers(0, 99)), dtype)
    place = tmp_path_factory.mktemp("random")
    write_hf(place / "0", config, tensors)
    for step in range(2):
        to = draw(st.sampled_from(["megatron", "hf", "flagai", "metaseq"]))
        tp = draw(st.integers(1, 6)) if to != "hf" else 1
        pp = draw(st.integers(1, 5)) if to == "megatron" else 1
        options = ConversionOptions(to, tp, pp, max_shard_size=draw(st.integers(1, 3000)))
        divided = (heads, ours.ffn_hidden_size, *((ours.vocab_size,) if to == "flagai" else ()))
        fits = not any(n % tp for n in divided) and layers % pp == 0
        if to == "metaseq" and post_norm and tp > 1:
            fits = False
        if not fits:
            with pytest.raises(UserError):
                convert(place / str(step), place / "refused", options)
            assert not (place / "refused").exists()
            options = ConversionOptions("hf")
        convert(place / str(step), place / str(step + 1), options, fsync=False, workers=draw(st.integers(1, 3)))
    assert_same(tensors, contents(place / "2"))
    shutil.rmtree(place)


def test_converted_model_gives_the_same_logits(models, tmp_path, alone):
    source, oracle = models["story"]
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = oracle(tokens).logits
        for options in (megatron(4, 2), ConversionOptions("metaseq", 4), ConversionOptions("flagai", 2)):
            target = tmp_path / options.to
            convert(source, target, options, fsync=False)
            assert torch.equal(load_model(target, None, alone, "float32")(tokens), expected)


def test_dtype_casts_and_is_recorded(tmp_path):
    config = hf_config()
    tensors = random_tensors(config, dtype=torch.float32)
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "half", megatron(2, dtype="bfloat16"), fsync=False)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(contents(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_a_tokenizer_can_be_brought_along(tmp_path):
    config = hf_config()
    write_metaseq_flat(tmp_path / "source", config, random_tensors(config), 2, 2)
    convert(tmp_path / "source", tmp_path / "c", megatron(2), tokenizer=EMBEDDED_DIRECTORY, fsync=False)
    assert (tmp_path / "c" / "merges.txt").read_bytes() == (EMBEDDED_DIRECTORY / "merges.txt").read_bytes()
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        convert(tmp_path / "source", tmp_path / "d", megatron(2), tokenizer=tmp_path, fsync=False)
    assert not (tmp_path / "d").exists()
