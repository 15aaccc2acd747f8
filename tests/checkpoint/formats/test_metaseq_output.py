"""What is written for metaseq is judged by what its code reads (at f7ffa5f), done again here; not by our reader."""

import argparse
import json
import math

import pytest
import torch
from checkpoint_samples import POST, POST_TENSORS
from factory import prompts_for
from formats import write_hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY


@pytest.fixture(scope="module")
def parts(models, tmp_path_factory):
    """The directory of a model in two parts, and its transformers model."""
    source, reference = models["pre-norm"]
    target = tmp_path_factory.mktemp("metaseq") / "m"
    convert(source, target, ConversionOptions("metaseq", 2), fsync=False)
    return target, reference


def load(directory):
    return [torch.load(path, weights_only=False) for path in sorted(directory.glob("*.pt"))]


def upgrade_state_dict(state):
    """metaseq.checkpoint_utils._is_checkpoint_sharded and _upgrade_state_dict, through which every file goes."""
    assert isinstance(state["cfg"]["distributed_training"]["use_sharded_state"], bool)
    history = state["optimizer_history"][-1]
    if "lr_scheduler_state" not in history:
        history["lr_scheduler_state"] = {"best": history["best_loss"]}
    history.setdefault("num_updates", 0)
    extra = state["extra_state"]
    if "train_iterator" not in extra:
        extra["train_iterator"] = {"epoch": extra["epoch"], "iterations_in_epoch": extra.get("batch_offset", 0)}
    return state


def build_arguments(arguments):
    """`base_lm_architecture` and the checks of ModelParallelTransformerLanguageModel.build_model."""
    defaults = {
        "activation_fn": "relu",
        "decoder_embed_dim": 512,
        "decoder_ffn_embed_dim": 2048,
        "decoder_layers": 6,
        "decoder_attention_heads": 8,
        "share_decoder_input_output_embed": False,
        "decoder_learned_pos": False,
        "no_scale_embedding": False,
        "max_target_positions": getattr(arguments, "tokens_per_sample", 1024),
    }
    built = argparse.Namespace(**defaults | vars(arguments))
    assert arguments.use_sharded_state and built.decoder_learned_pos and built.share_decoder_input_output_embed
    assert built._name == "transformer_lm_megatron" and isinstance(built.criterion, str)
    return built


def metaseq_logits(states, ids):
    """ModelParallelTransformerDecoder with all parts in one process: [tokens, vocabulary]."""
    args = build_arguments(states[0]["cfg"]["model"])
    assert args.model_parallel_size == len(states) and args.activation_fn == "relu"
    models = [{name.removeprefix("decoder."): value.float() for name, value in s["model"].items()} for s in states]
    width, heads = args.decoder_embed_dim, args.decoder_attention_heads // len(states)

    def norm(x, name):
        return functional.layer_norm(x, (width,), models[0][f"{name}.weight"], models[0][f"{name}.bias"])

    def row_parallel(inputs, name):
        sums = [x @ m[f"{name}.weight"].t() for x, m in zip(inputs, models, strict=True)]
        return sum(sums) + models[0][f"{name}.bias"]

    def attention(model, x, name):
        k, v, q = functional.linear(x, model[f"{name}.weight"], model[f"{name}.bias"]).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)

    embedding = torch.cat([model["embed_tokens.weight"] for model in models])
    table = models[0]["embed_positions.weight"]
    assert table.shape == (args.max_target_positions + 2, width)
    x = embedding[ids] * (1.0 if args.no_scale_embedding else math.sqrt(width)) + table[2 : 2 + len(ids)]
    for layer in range(args.decoder_layers):
        at = f"layers.{layer}."
        normed = norm(x, f"{at}self_attn_layer_norm")
        attended = [attention(model, normed, f"{at}self_attn.qkv_proj") for model in models]
        x = x + row_parallel(attended, f"{at}self_attn.out_proj")
        normed = norm(x, f"{at}final_layer_norm")
        wide = [functional.linear(normed, m[f"{at}fc1.weight"], m[f"{at}fc1.bias"]).relu() for m in models]
        x = x + row_parallel(wide, f"{at}fc2")
    return norm(x, "layer_norm") @ embedding.t()


def test_a_model_built_from_the_file_alone_is_the_same_function(parts):
    directory, reference = parts
    states = [upgrade_state_dict(state) for state in load(directory)]
    assert all(state["model"]["decoder.version"].tolist() == [3.0] for state in states)
    ids = torch.tensor(prompts_for(reference)[1])
    with torch.no_grad():
        want = reference(ids[None]).logits[0]
    got = metaseq_logits(states, ids)  # of 520 rows: its dictionary is padded to a multiple of 8
    assert (got[:, : want.shape[1]] - want).abs().max() < 1e-4


def flatten(state):
    """metaseq.scripts.reshard_consolidated for one shard: FSDP path -> vector."""
    weights, metadata = dict(state["model"]), state["shard_metadata"]
    for buffer in metadata["buffer_names"]:
        weights.pop(buffer)
    vectors = {}
    for entry in metadata["param_metadata"]:
        path = entry["fsdp_path"]
        for flat in entry["params"].values():
            names = [f"{path}.{name}" if path else name for name in flat["names"]]
            vectors[path] = torch.cat([weights.pop(name).flatten() for name in names])
    assert not weights  # every tensor is in a group
    return vectors


def unflatten(vectors, metadata):
    """metaseq.scripts.reshard_fsdp, with unflatten_weights."""
    tensors = {}
    for entry in metadata["param_metadata"]:
        path = entry["fsdp_path"]
        for flat in entry["params"].values():
            names, shapes, numels, padding = flat.values()
            assert sum(numels) == len(vectors[path]) and padding == 0
            for name, part, shape in zip(names, vectors[path].split(numels), shapes, strict=True):
                tensors[f"{path}.{name}" if path else name] = part.view(shape)
        for source, alias in entry["shared_param_info"]:
            tensors[alias] = tensors[source]
    return tensors


def test_parts_can_be_resharded(parts):
    for state in load(parts[0]):
        metadata = state["shard_metadata"]
        again = unflatten(flatten(state), metadata)
        assert again.keys() == state["model"].keys() - {"decoder.version"} | {"decoder.output_projection.weight"}
        assert all(torch.equal(again[name], state["model"][name]) for name in state["model"].keys() & again.keys())
        # The order in which ModelParallelTransformerDecoderLayer registers its modules.
        layer = metadata["param_metadata"][1]
        assert layer["fsdp_path"] == "decoder.layers.0"
        modules = ["self_attn.qkv_proj", "self_attn.out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
        names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        assert layer["params"]["flat_param_0"]["names"] == names


def task_dictionary(directory):
    """The symbols of LanguageModelingTask's Dictionary: its own four, the tokenizer's, padded to a multiple of 8."""
    vocabulary = json.loads((directory / "gpt2-vocab.json").read_text(encoding="utf-8"))
    by_id = {index: token for token, index in vocabulary.items()}
    assert [by_id[index] for index in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    symbols = [by_id[index] for index in range(len(by_id))]
    number = 0
    while len(symbols) % 8:
        name = f"madeupword{number:04d}"
        symbols += [name] if name not in symbols else []
        number += 1
    return symbols


def loaded_dictionary(directory):
    """metaseq.data.Dictionary.load of dict.txt."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    for line in (directory / "dict.txt").read_text(encoding="utf-8").splitlines():
        word, count = line.rstrip().rsplit(" ", 1)
        assert int(count) >= 0 and word not in symbols
        symbols.append(word)
    return symbols


def small_tokenizer(directory, extra):
    """A byte-level BPE with `extra` tokens besides the special ones and the alphabet, as files of its own."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = special + alphabet + [f"madeupword{number:04d}" for number in range(extra)]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    directory.mkdir()
    bpe.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("extra", [0, 3])
def test_the_tokenizer_has_metaseqs_names(parts, tmp_path, extra):
    tokenizer = small_tokenizer(tmp_path / "t", extra)
    summary = convert(parts[0], tmp_path / "m", ConversionOptions("metaseq"), tokenizer=tokenizer, fsync=False)
    assert loaded_dictionary(tmp_path / "m") == task_dictionary(tmp_path / "m")
    assert (tmp_path / "m" / "gpt2-merges.txt").read_text().startswith("#version")
    rows = -(-(260 + extra) // 8) * 8
    assert summary.notes == [f"metaseq makes {rows} rows of this tokenizer, and will not load a model that has 520"]


def test_the_files_of_a_tokenizer_are_copied_as_they_are(tmp_path):
    summary = convert(EMBEDDED_DIRECTORY, tmp_path / "m", ConversionOptions("metaseq"), fsync=False)
    for theirs, ours in (("gpt2-vocab.json", "vocab.json"), ("gpt2-merges.txt", "merges.txt")):
        assert (tmp_path / "m" / theirs).read_bytes() == (EMBEDDED_DIRECTORY / ours).read_bytes()
    assert loaded_dictionary(tmp_path / "m") == task_dictionary(tmp_path / "m")
    assert summary.notes == []
    convert(EMBEDDED_DIRECTORY, tmp_path / "m", ConversionOptions("hf"), force=True, fsync=False)  # none is a stranger


def test_350m_is_one_file_that_is_not_flattened(tmp_path):
    write_hf(tmp_path / "hf", POST, POST_TENSORS)
    summary = convert(tmp_path / "hf", tmp_path / "m", ConversionOptions("metaseq"), fsync=False)
    [state] = load(tmp_path / "m")
    assert "shard_metadata" not in upgrade_state_dict(state)
    assert summary.notes == ["metaseq loads nothing without gpt2-vocab.json and gpt2-merges.txt: give --tokenizer DIR"]
