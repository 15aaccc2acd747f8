"""OPTConfig: the table of sizes, and Hugging Face's config.json in and out."""

import json

import pytest
from transformers import OPTConfig as HFConfig

from opt_megatron.config import RELEASED_SIZES, OPTConfig, released_config, released_name
from opt_megatron.errors import CheckpointError, UserError


@pytest.mark.parametrize("name", RELEASED_SIZES)
def test_parameter_count_of_every_released_size(name):
    assert RELEASED_SIZES[name].config.num_parameters == RELEASED_SIZES[name].num_parameters


def test_350m_is_the_odd_one():
    odd = [n for n, s in RELEASED_SIZES.items() if not s.config.do_layer_norm_before]
    assert odd == ["opt-350m"]
    config = released_config("opt-350m")
    assert (config.word_embed_proj_dim, config.hidden_size, config.has_final_layer_norm) == (512, 1024, False)


@pytest.mark.parametrize("name", ["opt-1.3b", "facebook/opt-1.3b", "opt-1.3b-en", "OPT-1.3B", "1.3b"])
def test_names_people_use(name):
    assert released_config(name) is RELEASED_SIZES["opt-1.3b"].config


def test_unknown_name_lists_the_known_ones():
    assert released_name("opt-1.4b") is None
    with pytest.raises(UserError, match=r"opt-1\.4b.*opt-125m"):
        released_config("opt-1.4b")


@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_written_config_is_read_by_transformers_and_back(name):
    config = released_config(name)
    theirs = HFConfig(**config.to_hf())
    assert (theirs.num_hidden_layers, theirs.ffn_dim) == (config.num_layers, config.ffn_hidden_size)
    assert OPTConfig.from_hf(theirs.to_dict()).replace(name=name) == config


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_old_and_new_style_dtype(key):
    values = released_config("opt-125m").to_hf()
    del values["dtype"], values["torch_dtype"]
    assert OPTConfig.from_hf(values | {key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_size": "768"}, "'hidden_size' is '768', not an integer"),
        ({"num_attention_heads": 7}, "hidden_size 768 does not divide by num_attention_heads 7"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32, float16, bfloat16"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ({"dropout": "much"}, "'dropout' is 'much'"),
    ],
)
def test_bad_config_is_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(released_config("opt-125m").to_hf() | change))
    with pytest.raises(CheckpointError, match=message):
        OPTConfig.from_directory(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "holds a list")])
def test_damaged_config_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        OPTConfig.from_directory(tmp_path)
