"""metaseq's files: parts, shards and singletons are read, and parts are written as metaseq's scripts read them."""

import shutil

import pytest
from checkpoint_samples import POST, POST_TENSORS, PRE, SAMPLES, TENSORS, assert_holds
from formats import (
    hf_config,
    load,
    metaseq_content,
    metaseq_part,
    random_tensors,
    save,
    write_flagai,
    write_hf,
    write_metaseq_parts,
    write_metaseq_singleton,
)

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError


def test_350m_is_known_by_its_missing_final_norm(tmp_path):
    write_metaseq_singleton(tmp_path / "m", POST, POST_TENSORS, fused=False, name="reshard.pt")
    checkpoint = assert_holds(tmp_path / "m", POST_TENSORS)
    assert checkpoint.config == OPTConfig.from_hf(POST)
    assert_holds(tmp_path / "m" / "reshard.pt", POST_TENSORS)  # one file is a checkpoint too
    assert_holds(write_flagai(tmp_path / "f", POST, POST_TENSORS, 2), POST_TENSORS)


def test_numbers_are_sorted_as_numbers(tmp_path):
    config = hf_config(num_attention_heads=12, ffn_dim=24)
    tensors = random_tensors(config)
    assert_holds(write_metaseq_parts(tmp_path, config, tensors, 12), tensors)  # part 10 comes after part 9


def test_heads_that_nothing_tells_ask_for_a_config(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    save(content | {"cfg": {}, "args": None}, tmp_path / "restored.pt")
    with pytest.raises(CheckpointError, match=r"number of attention heads.*--config"):
        open_checkpoint(tmp_path)
    assert_holds(tmp_path, TENSORS, OPTConfig.from_hf(PRE))


def test_old_files_keep_their_arguments_under_args(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    save(content | {"args": content.pop("cfg")["model"]}, tmp_path / "restored.pt")
    assert open_checkpoint(tmp_path).config.num_attention_heads == 4


def test_attention_cut_at_documents_is_reported(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    content["cfg"]["model"].self_attn_doc_sep = 2
    save(content, tmp_path / "restored.pt")
    assert any("self_attn_doc_sep is 2" in note for note in open_checkpoint(tmp_path).config_notes)


def test_metaseq_activation_that_is_not_opts_is_refused(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    content["cfg"]["model"].activation_fn = "gelu"
    save(content, tmp_path / "restored.pt")
    with pytest.raises(CheckpointError, match="activation_fn 'gelu'"):
        open_checkpoint(tmp_path)


def test_parts_of_another_model_are_found_when_they_are_read(tmp_path):
    write_metaseq_parts(tmp_path / "a", PRE, TENSORS, 2)
    write_metaseq_parts(tmp_path / "b", PRE, random_tensors(PRE, seed=9), 2)
    shutil.copy(tmp_path / "b" / "reshard-model_part-1.pt", tmp_path / "a" / "reshard-model_part-1.pt")
    checkpoint = open_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight is not the same in parts 0 and 1"):
        checkpoint.read("model.decoder.embed_positions.weight")


def test_parts_of_another_size_do_not_fit(tmp_path):
    write_metaseq_parts(tmp_path / "a", PRE, TENSORS, 2)
    other = hf_config(hidden_size=16, word_embed_proj_dim=16)
    write_metaseq_parts(tmp_path / "b", other, random_tensors(other), 2)
    shutil.copy(tmp_path / "b" / "reshard-model_part-1.pt", tmp_path / "a" / "reshard-model_part-1.pt")
    with pytest.raises(CheckpointError, match="the parts are not of one model"):
        open_checkpoint(tmp_path / "a")


def test_flat_files_without_metadata_are_refused(tmp_path):
    SAMPLES["flat"](tmp_path)
    for path in tmp_path.glob("*.pt"):
        content = load(path)
        del content["shard_metadata"]
        save(content, path)
    with pytest.raises(CheckpointError, match="shard_metadata does not say"):
        open_checkpoint(tmp_path)


def test_metadata_that_lies_is_refused(tmp_path):
    SAMPLES["flat"](tmp_path)
    for shape in ([4, "many"], [-1, 3], [10**12, 10**12]):
        content = load(tmp_path / "reshard-model_part-0.pt")
        content["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["shapes"][0] = shape
        save(content, tmp_path / "reshard-model_part-0.pt")
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_metaseqs_files_are_read_with_the_config_next_to_them(tmp_path):
    """A pre-norm model without a final norm, with different token ids: the shapes alone would give another config."""
    config = hf_config(_remove_final_layer_norm=True, bos_token_id=5, eos_token_id=7, pad_token_id=3)
    tensors = random_tensors(config)
    del tensors["model.decoder.final_layer_norm.weight"], tensors["model.decoder.final_layer_norm.bias"]
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "m", ConversionOptions("metaseq", 2), fsync=False)
    assert open_checkpoint(tmp_path / "m").config == OPTConfig.from_hf(config)
    (tmp_path / "m" / "config.json").unlink()
    assert open_checkpoint(tmp_path / "m").config.do_layer_norm_before  # from cfg.model
