"""Every format gives the same canonical tensors and config, or says what is wrong with the set of files."""

import json
import shutil

import pytest
import torch
from formats import (
    POST_NORM,
    hf_config,
    load,
    metaseq_content,
    metaseq_part,
    random_tensors,
    save,
    write_flagai,
    write_hf,
    write_megatron_lm,
    write_metaseq_flat,
    write_metaseq_parts,
    write_metaseq_singleton,
)

from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError

PRE, POST = hf_config(), hf_config(**POST_NORM)
OPT_CONFIG = OPTConfig.from_hf(PRE)
TENSORS, POST_TENSORS = random_tensors(PRE), random_tensors(POST, seed=1)
WRITERS = {
    "hf": lambda d: write_hf(d, PRE, TENSORS),
    "flagai": lambda d: write_flagai(d, PRE, TENSORS, 2),
    "flagai-4": lambda d: write_flagai(d, PRE, TENSORS, 4),
    "flagai-single": lambda d: write_flagai(d, PRE, TENSORS, 1),
    "fsdp": lambda d: write_metaseq_flat(d, PRE, TENSORS, 2, 3),
    "fsdp-many": lambda d: write_metaseq_flat(d, PRE, TENSORS, 4, 11),
    "flat": lambda d: write_metaseq_flat(d, PRE, TENSORS, 2, 1),
    "parts": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2),
    "opt-iml-30b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2, "checkpoint_1_4000.pt-model_part-{}.pt"),
    "opt-iml-175b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 4, "checkpoint_1_8000-model_part-{}.pt"),
    "66b": lambda d: write_metaseq_parts(d, PRE, TENSORS, 2, "reshard-part-{}-shard0.pt"),
    "singleton": lambda d: write_metaseq_singleton(d, PRE, TENSORS, fused=True, name="restored.pt"),
    "singleton-split": lambda d: write_metaseq_singleton(d, PRE, TENSORS, fused=False, name="reshard.pt"),
    "megatron-lm": lambda d: write_megatron_lm(d, PRE, TENSORS, 1, 1),
    "megatron-lm-2x2": lambda d: write_megatron_lm(d, PRE, TENSORS, 2, 2, te=True),
}


def assert_holds(path, tensors, config=None):
    checkpoint = open_checkpoint(path, config)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        rows = slice(tensor.size(0) // 3, tensor.size(0) - 1)
        block = (rows, *[slice(1, size - 2) for size in tensor.shape[1:]])
        assert torch.equal(checkpoint.read(name, block), tensor[block]), name
    return checkpoint


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_holds_the_same_tensors(tmp_path, name):
    directory = WRITERS[name](tmp_path / name)
    config = None
    if name.startswith("megatron-lm"):  # a vocabulary of 24 is padded to 32; nothing but a config can tell
        config = OPTConfig.from_hf(PRE)
    checkpoint = assert_holds(directory, TENSORS, config)
    assert checkpoint.config == OPTConfig.from_hf(PRE)
    assert bool(checkpoint.config_notes) == (not (directory / "config.json").exists() and config is None)


def test_350m_is_known_by_its_missing_final_norm(tmp_path):
    write_metaseq_singleton(tmp_path / "m", POST, POST_TENSORS, fused=False, name="reshard.pt")
    checkpoint = assert_holds(tmp_path / "m", POST_TENSORS)
    assert checkpoint.config == OPTConfig.from_hf(POST)
    assert_holds(tmp_path / "m" / "reshard.pt", POST_TENSORS)  # one file is a checkpoint too
    assert_holds(write_flagai(tmp_path / "f", POST, POST_TENSORS, 2), POST_TENSORS)


def test_a_table_without_opts_two_unused_rows_gets_them_back(tmp_path):
    tensors = random_tensors(PRE)
    name = "model.decoder.embed_positions.weight"
    tensors[name][:2] = 0
    short = dict(tensors) | {name: tensors[name][2:].clone()}
    write_megatron_lm(tmp_path, PRE, short, 2, 1)
    assert_holds(tmp_path, tensors, OPTConfig.from_hf(PRE))


def test_numbers_are_sorted_as_numbers(tmp_path):
    config = hf_config(num_attention_heads=12, ffn_dim=24)
    tensors = random_tensors(config)
    assert_holds(write_metaseq_parts(tmp_path, config, tensors, 12), tensors)  # part 10 comes after part 9


def test_config_overrides_what_is_derived(tmp_path):
    write_metaseq_parts(tmp_path, PRE, TENSORS, 2)
    other = OPTConfig.from_hf(hf_config(num_attention_heads=2))
    assert open_checkpoint(tmp_path, other).config.num_attention_heads == 2


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


def test_attention_cut_at_documents_is_told(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    content["cfg"]["model"].self_attn_doc_sep = 2
    save(content, tmp_path / "restored.pt")
    assert any("self_attn_doc_sep is 2" in note for note in open_checkpoint(tmp_path).config_notes)


def unlink(*names):
    return lambda d: [(d / name).unlink() for name in names]


def rewrite(path, **changes):
    """Read one of the test's own files, change entries of its model, and save it again."""
    content = load(path)
    for name, value in changes.items():
        content["model"] = content["model"] | {name.replace("__", "."): value}
    save(content, path)


DAMAGES = [
    ("parts", unlink("reshard-model_part-0.pt"), "1 files make up to 2 parts x 1 shards, but 1 are missing: part 0"),
    ("parts", unlink("reshard-model_part-1.pt"), "1 of 2 parts are here: they hold 6 of the 12 columns"),
    ("fsdp", unlink("checkpoint_last-model_part-1-shard1.pt"), "missing: part 1 shard 1"),
    ("fsdp", unlink(*[f"checkpoint_last-model_part-{p}-shard2.pt" for p in (0, 1)]), "shards are missing"),
    (
        "parts",
        lambda d: shutil.copy(d / "reshard-model_part-1.pt", d / "reshard-model_part-01.pt"),
        "are the same part",
    ),
    ("parts", lambda d: shutil.copy(d / "reshard-model_part-1.pt", d / "restored.pt"), "files of 2 checkpoints"),
    ("flagai-4", unlink("pytorch_model_02.bin"), "3 parts are here, 1 are missing: pytorch_model_02"),
    ("flagai-4", unlink("pytorch_model_03.bin"), "hold 18 of 24 vocabulary rows: parts are missing"),
    ("flagai", lambda d: shutil.copy(d / "pytorch_model_01.bin", d / "pytorch_model_1.bin"), "are the same part"),
    ("singleton", lambda d: torch.save([1, 2], d / "restored.pt"), "has no 'model' dictionary"),
    ("singleton", lambda d: torch.save({"model": {"weight": torch.ones(2)}}, d / "restored.pt"), "give --config"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_incomplete_and_mixed_sets_are_refused_with_what_is_there(tmp_path, name, damage, message):
    directory = WRITERS[name](tmp_path / "set")
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


def test_parts_of_another_model_are_found_when_they_are_read(tmp_path):
    write_metaseq_parts(tmp_path / "a", PRE, TENSORS, 2)
    write_metaseq_parts(tmp_path / "b", PRE, random_tensors(PRE, seed=9), 2)
    shutil.copy(tmp_path / "b" / "reshard-model_part-1.pt", tmp_path / "a" / "reshard-model_part-1.pt")
    checkpoint = open_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight is not the same in parts 0 and 1"):
        checkpoint.read("model.decoder.embed_positions.weight")


COPIES = [
    ("parts", "reshard-model_part-{}.pt", "parts 0 and 1 hold the same slice"),
    ("flagai", "pytorch_model_0{}.bin", "parts 0 and 1 hold the same slice"),
    ("megatron-lm-2x2", "iter_0001000/mp_rank_0{}_000/model_optim_rng.pt", "ranks 0 and 1 hold the same slice"),
    ("megatron-lm-2x2", "iter_0001000/mp_rank_00_00{}/model_optim_rng.pt", "missing|hold the same slice"),
]


@pytest.mark.parametrize(("name", "file", "message"), COPIES)
def test_a_part_that_was_copied_over_another_is_found(tmp_path, name, file, message):
    directory = WRITERS[name](tmp_path / "set")
    shutil.copy(directory / file.format(0), directory / file.format(1))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory, OPT_CONFIG)


def test_stored_copies_of_the_embedding_are_compared(tmp_path):
    """metaseq's output projection, FlagAI's whole head, and the last Megatron stage's head."""
    embedding = "model.decoder.embed_tokens.weight"
    WRITERS["parts"](tmp_path / "m")
    rewrite(tmp_path / "m" / "reshard-model_part-1.pt", decoder__output_projection__weight=torch.ones(12, 12).half())
    WRITERS["flagai"](tmp_path / "f")
    content = torch.load(tmp_path / "f" / "pytorch_model_01.bin")
    content["module"]["lm_head.weight"] = torch.ones(24, 12).half()
    torch.save(content, tmp_path / "f" / "pytorch_model_01.bin")
    WRITERS["megatron-lm-2x2"](tmp_path / "l")
    rewrite(
        tmp_path / "l/iter_0001000/mp_rank_01_001/model_optim_rng.pt", output_layer__weight=torch.ones(16, 12).half()
    )
    for place in "mfl":
        with pytest.raises(CheckpointError, match=r"OPT ties the two|not the same in parts"):
            open_checkpoint(tmp_path / place, OPT_CONFIG).read(embedding)


def test_ranks_of_another_model_are_found_when_they_are_read(tmp_path):
    write_megatron_lm(tmp_path / "a", PRE, TENSORS, 2, 1)
    write_megatron_lm(tmp_path / "b", PRE, random_tensors(PRE, seed=9), 2, 1)
    file = "iter_0001000/mp_rank_01/model_optim_rng.pt"
    shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with pytest.raises(CheckpointError, match=r"is not the same in parts 0 and 1"):
        open_checkpoint(tmp_path / "a", OPT_CONFIG).read("model.decoder.final_layer_norm.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"squared_relu": True}, "squared_relu=True; in OPT it is False"),
        ({"normalization": "RMSNorm"}, "normalization='RMSNorm'"),
        ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon=1e-06"),
        ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}, "TP2 x PP1 are here, but args says TP4"),
    ],
)
def test_megatron_arguments_that_are_not_opts_are_refused(tmp_path, change, message):
    write_megatron_lm(tmp_path, PRE, TENSORS, 2, 1)
    path = tmp_path / "iter_0001000/mp_rank_00/model_optim_rng.pt"
    content = load(path)
    vars(content["args"]).update(change)
    save(content, path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, OPT_CONFIG)


def test_metaseq_activation_that_is_not_opts_is_refused(tmp_path):
    content = metaseq_content(PRE, metaseq_part(PRE, TENSORS, 0, 1), 1)
    content["cfg"]["model"].activation_fn = "gelu"
    save(content, tmp_path / "restored.pt")
    with pytest.raises(CheckpointError, match="activation_fn 'gelu'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_named_is_the_one_that_is_read(tmp_path, name):
    other = random_tensors(PRE, seed=4)
    write_hf(tmp_path, PRE, TENSORS)
    torch.save(other, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path / name, TENSORS if name.endswith("safetensors") else other)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    write_hf(tmp_path, PRE, TENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__0__self_attn__qkv_proj__weight": torch.tensor(1.0)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__²__fc1__weight": torch.ones(2)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__99999999__fc1__weight": torch.ones(2)}),
        lambda d: rewrite(d / "restored.pt", **{"decoder__layers__0__fc1__bias": torch.ones(20).double()}),
        lambda d: (d / "restored.pt").rename(d / "reshard-model_part-30000000.pt"),
    ],
)
@pytest.mark.timeout(30)
def test_hostile_names_and_shapes_are_one_line(tmp_path, damage):
    WRITERS["singleton"](tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("text", ['{"model_type": "opt", "num_hidden_layers": 1000000000}', "[" * 100_000])
def test_hostile_configs_are_one_line(tmp_path, text):
    write_hf(tmp_path, PRE, TENSORS)
    values = json.loads(text) if text[0] == "{" else None
    (tmp_path / "config.json").write_text(json.dumps(PRE | values) if values else text)
    with pytest.raises(CheckpointError, match=r"more than the 10000|cannot be read as JSON"):
        open_checkpoint(tmp_path)


def test_parts_of_another_size_do_not_fit(tmp_path):
    write_metaseq_parts(tmp_path / "a", PRE, TENSORS, 2)
    other = hf_config(hidden_size=16, word_embed_proj_dim=16)
    write_metaseq_parts(tmp_path / "b", other, random_tensors(other), 2)
    shutil.copy(tmp_path / "b" / "reshard-model_part-1.pt", tmp_path / "a" / "reshard-model_part-1.pt")
    with pytest.raises(CheckpointError, match="the parts are not of one model"):
        open_checkpoint(tmp_path / "a")


def test_unknown_keys_are_never_dropped_in_silence(tmp_path):
    WRITERS["singleton"](tmp_path)
    rewrite(tmp_path / "restored.pt", decoder__surprise__weight=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"1 unknown: model\.decoder\.surprise\.weight"):
        open_checkpoint(tmp_path)


def test_flat_files_without_metadata_are_refused(tmp_path):
    WRITERS["flat"](tmp_path)
    for path in tmp_path.glob("*.pt"):
        content = load(path)
        del content["shard_metadata"]
        save(content, path)
    with pytest.raises(CheckpointError, match="shard_metadata does not say"):
        open_checkpoint(tmp_path)


def test_biases_that_flagais_converter_cut_wrongly_are_refused(tmp_path):
    WRITERS["flagai"](tmp_path)
    for part in range(2):
        path = tmp_path / f"pytorch_model_{part:02d}.bin"
        content = load(path)
        name = "model.decoder.layers.0.fc1.bias"
        content["module"][name] = TENSORS[name].clone()  # whole where it should be cut
        save(content, path)
    with pytest.raises(CheckpointError, match=r"1 biases have wrong shapes.*FlagAI's converter"):
        open_checkpoint(tmp_path)


def test_metadata_that_lies_is_refused(tmp_path):
    WRITERS["flat"](tmp_path)
    for shape in ([4, "many"], [-1, 3], [10**12, 10**12]):
        content = load(tmp_path / "reshard-model_part-0.pt")
        content["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["shapes"][0] = shape
        save(content, tmp_path / "reshard-model_part-0.pt")
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_megatron_lm_config_is_derived_from_args_and_shapes(tmp_path):
    config = hf_config(vocab_size=32)  # needs no padding at TP2
    tensors = random_tensors(config)
    write_megatron_lm(tmp_path, config, tensors, 2, 1)
    checkpoint = assert_holds(tmp_path, tensors)
    assert checkpoint.config == OPTConfig.from_hf(config)
    assert "4 attention heads from args" in " ".join(checkpoint.config_notes)


def test_hugging_face_without_config_takes_heads_from_the_table_or_asks(tmp_path):
    write_hf(tmp_path, PRE, TENSORS)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="--config"):
        open_checkpoint(tmp_path)
    (tmp_path / "elsewhere.json").write_text(json.dumps(PRE))
    assert_holds(tmp_path, TENSORS, OPTConfig.from_file(tmp_path / "elsewhere.json"))
