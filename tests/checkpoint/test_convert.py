"""Conversion: no bit is lost between any two formats, and a target is whole or not there."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from formats import POST_NORM, hf_config, random_tensors, write_flagai, write_hf, write_metaseq_flat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.megatron_ranks import pipeline_stages
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.load import load_model
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.manifest import MANIFEST, read_manifest
from opt_megatron.config import OPTConfig
from opt_megatron.errors import CheckpointError, UserError


def megatron(tp: int, pp: int = 1, **options) -> ConversionOptions:
    return ConversionOptions(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **options)


def contents(path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (6, 1), (1, 3), (3, 4), (2, 12)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_every_megatron_layout_keeps_every_bit(models, tmp_path, name, tp, pp):
    source = models[name][0]
    convert(source, tmp_path / "converted", megatron(tp, pp), fsync=False)
    assert_same(contents(source), contents(tmp_path / "converted"))


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
        fits = not any(n % tp for n in (heads, ours.ffn_hidden_size, ours.vocab_size)) and layers % pp == 0
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


def test_blocks_of_rows_do_not_change_the_result(tmp_path, monkeypatch):
    """Tensors larger than a block are copied in pieces; here a block is a row or two."""
    from opt_megatron.checkpoint import write as scatter

    config = hf_config()
    tensors = random_tensors(config)
    write_metaseq_flat(tmp_path / "source", config, tensors, 2, 3)
    convert(tmp_path / "source", tmp_path / "large", megatron(2, 2), fsync=False)
    monkeypatch.setattr(scatter, "BLOCK_BYTES", 50)
    convert(tmp_path / "source", tmp_path / "small", megatron(2, 2), fsync=False)
    assert_same(tensors, contents(tmp_path / "small"))
    assert read_manifest(tmp_path / "small") == read_manifest(tmp_path / "large")


def test_files_are_megatron_lms(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2, 2))
    target = tmp_path / "c"
    assert (target / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    ranks = sorted(path.name for path in (target / "release").iterdir())
    assert ranks == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
    file = torch.load(target / "release" / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=False)
    assert file["checkpoint_version"] == 3.0
    assert (file["args"].num_layers, file["args"].tensor_model_parallel_size) == (4, 2)
    assert all(isinstance(value, int | float | str | bool) for value in vars(file["args"]).values())
    # The last stage numbers its layers from 0 and carries the tied head.
    assert file["model"]["output_layer.weight"].shape == (4096 // 2, 256)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in file["model"]
    for name in ("config.json", "vocab.json", "merges.txt", MANIFEST):
        assert (target / name).is_file()


def test_megatron_qkv_is_rebuilt_from_the_source_by_hand(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), fsync=False)
    stored = load_file(EMBEDDED_DIRECTORY / "model.safetensors")
    layer = "model.decoder.layers.2.self_attn."
    heads = [stored[f"{layer}{name}_proj.weight"].view(8, 32, 256) for name in "qkv"]
    expected = torch.cat([heads[part][head] for head in range(4, 8) for part in range(3)])
    file = torch.load(tmp_path / "c" / "release" / "mp_rank_01" / "model_optim_rng.pt", weights_only=False)
    assert torch.equal(file["model"]["decoder.layers.2.self_attention.linear_qkv.weight"], expected)


@pytest.mark.parametrize("options", [ConversionOptions(to="hf"), ConversionOptions(to="hf", max_shard_size=2_000_000)])
def test_transformers_loads_the_export_without_a_warning(tmp_path, models, options, caplog, recwarn):
    from transformers import OPTForCausalLM

    convert(EMBEDDED_DIRECTORY, tmp_path / "m", megatron(2, 2), fsync=False)
    convert(tmp_path / "m", tmp_path / "hf", options, fsync=False)
    caplog.clear()
    loaded, report = OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [record.message for record in caplog.records] == []
    assert not [w for w in recwarn.list if "opt" in str(w.message).lower()]
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, models["story"][1](tokens).logits)


def test_metaseq_parts_hold_what_metaseqs_scripts_read(tmp_path):
    convert(
        EMBEDDED_DIRECTORY, tmp_path / "m", ConversionOptions(to="metaseq", tensor_model_parallel_size=2), fsync=False
    )
    part = torch.load(tmp_path / "m" / "reshard-model_part-1.pt", weights_only=False)
    assert {"cfg", "model", "extra_state", "optimizer_history"} <= part.keys()
    assert part["cfg"]["model"].model_parallel_size == 2
    assert part["model"]["decoder.version"].tolist() == [3.0]
    stored = load_file(EMBEDDED_DIRECTORY / "model.safetensors")
    layer = "model.decoder.layers.1.self_attn."
    fused = torch.cat([stored[f"{layer}{letter}_proj.weight"].chunk(2)[1] for letter in "kvq"])
    assert torch.equal(part["model"]["decoder.layers.1.self_attn.qkv_proj.weight"], fused)


def test_converted_model_gives_the_same_logits(models, tmp_path, alone):
    source, oracle = models["story"]
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = oracle(tokens).logits
        for options in (megatron(4, 2), ConversionOptions("metaseq", 4), ConversionOptions("flagai", 2)):
            target = tmp_path / options.to
            convert(source, target, options, fsync=False)
            assert torch.equal(load_model(target, None, alone)(tokens), expected)


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


def test_uneven_pipeline_stages(tmp_path):
    config = hf_config(num_hidden_layers=7)
    tensors = random_tensors(config)
    write_hf(tmp_path / "source", config, tensors)
    options = megatron(2, 3, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=2)
    convert(tmp_path / "source", tmp_path / "uneven", options, fsync=False)
    assert_same(tensors, contents(tmp_path / "uneven"))
    with pytest.raises(UserError, match="7 layers cannot be divided into 3 pipeline stages: 7 % 3 = 1"):
        convert(tmp_path / "source", tmp_path / "refused", megatron(1, 3))


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((6, 3), [range(0, 2), range(2, 4), range(4, 6)]),
        ((7, 3, 1), [range(0, 1), range(1, 4), range(4, 7)]),
        ((7, 2, 3, 4), [range(0, 3), range(3, 7)]),
        ((5, 1), [range(0, 5)]),
    ],
)
def test_pipeline_stages(arguments, stages):
    assert pipeline_stages(*arguments) == stages


@pytest.mark.parametrize("arguments", [(6, 4), (7, 2, 3, 3), (7, 3, 0), (7, 3, 6, 1), (3, 4)])
def test_layers_that_cannot_be_divided(arguments):
    with pytest.raises(UserError, match="cannot be divided"):
        pipeline_stages(*arguments)


def test_manifest_says_what_was_read_and_its_hashes_know_no_layout(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "a", megatron(2, 2), fsync=False)
    convert(tmp_path / "a", tmp_path / "b", ConversionOptions("flagai", 4), fsync=False)
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")
    content = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert content["source"]["format"] == "Hugging Face safetensors"
    assert content["options"]["tensor_model_parallel_size"] == 2
    assert str(tmp_path) not in json.dumps(content)


# Atomic output


def test_nothing_is_overwritten_without_force(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1))
    with pytest.raises(UserError, match="--force replaces it"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), force=True)
    assert len(list((tmp_path / "c" / "release").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]  # the former one is gone, nothing is left beside


def test_force_never_removes_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "x.pt").touch()
    with pytest.raises(UserError, match=r"holds thesis\.txt .* left alone"):
        convert(EMBEDDED_DIRECTORY, tmp_path, megatron(1), force=True)
    copy = tmp_path / "copy"
    shutil.copytree(EMBEDDED_DIRECTORY, copy)
    for target in (copy, tmp_path):
        with pytest.raises(UserError, match="is the source or holds it"):
            convert(copy, target, megatron(1), force=True)


def test_damage_found_half_way_leaves_nothing_behind(tmp_path):
    config = hf_config()
    write_flagai(tmp_path / "source", config, random_tensors(config), 2)
    path = tmp_path / "source" / "pytorch_model_01.bin"
    content = torch.load(path)
    content["module"]["model.decoder.layers.1.fc2.bias"] += 1  # replicated, so it must be the same in both parts
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc2\.bias is not the same in parts 0 and 1"):
        convert(tmp_path / "source", tmp_path / "c", megatron(2))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """The limit on file size stands in for the disk's end: writing fails in the same way, in the same place."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000));"
        "from opt_megatron.cli import main; main(['convert', '--load', 'story', '--save', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("opt-megatron: error: ") and "cannot be written: File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_conversions_to_one_target_do_not_mix(tmp_path, monkeypatch):
    """The second is refused up to the very end of the first, when the journal is gone and the disk is waited for."""
    from opt_megatron.files import partial_directory

    refused, fsync_path = [], partial_directory.fsync_path

    def fsync_while_another_starts(path):
        monkeypatch.setattr(partial_directory, "fsync_path", fsync_path)
        with pytest.raises(UserError, match="another process is writing it"):
            convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1))
        refused.append(path)
        fsync_path(path)

    monkeypatch.setattr(partial_directory, "fsync_path", fsync_while_another_starts)
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    assert len(refused) == 1
    assert_same(contents(tmp_path / "c"), contents(EMBEDDED_DIRECTORY))


def test_a_run_killed_between_two_renames_gives_the_old_one_its_name_back(tmp_path):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(1), fsync=False)
    (tmp_path / "c").rename(tmp_path / ".c.replaced")
    with pytest.raises(UserError, match="--force replaces it"):
        convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2))
    assert_same(contents(tmp_path / "c"), contents(EMBEDDED_DIRECTORY))


def test_links_are_followed_and_other_kinds_of_file_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "link", "dangling"):
        convert(EMBEDDED_DIRECTORY, tmp_path / name, megatron(1), force=True, fsync=False)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "release").is_dir()
    assert (tmp_path / "made" / "release").is_dir()
    for name, message in (("loop", "no path that can be written"), ("fifo", "is not a directory")):
        with pytest.raises(UserError, match=message):
            convert(EMBEDDED_DIRECTORY, tmp_path / name, megatron(1), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "dangling", "loop", "fifo", "made"}


def test_metaseqs_files_carry_the_config_that_was_written_beside_them(tmp_path):
    """A pre-norm model without a final norm, with token ids of its own: shapes alone would tell another model."""
    config = hf_config(_remove_final_layer_norm=True, bos_token_id=5, eos_token_id=7, pad_token_id=3)
    tensors = random_tensors(config)
    del tensors["model.decoder.final_layer_norm.weight"], tensors["model.decoder.final_layer_norm.bias"]
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "m", ConversionOptions("metaseq", 2), fsync=False)
    assert open_checkpoint(tmp_path / "m").config == OPTConfig.from_hf(config)
    (tmp_path / "m" / "config.json").unlink()
    assert open_checkpoint(tmp_path / "m").config.do_layer_norm_before  # from cfg.model


def test_a_cast_that_would_overflow_names_the_tensor(tmp_path):
    config = hf_config()
    tensors = random_tensors(config, dtype=torch.float32)
    tensors["model.decoder.layers.0.fc1.bias"][2] = 1e6
    write_hf(tmp_path / "source", config, tensors)
    with pytest.raises(UserError, match=r"layers\.0\.fc1\.bias holds 1e\+06, and float16 ends at 65504"):
        convert(tmp_path / "source", tmp_path / "c", ConversionOptions("hf", dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(tmp_path / "source", tmp_path / "c", ConversionOptions("hf", dtype="bfloat16"), fsync=False)


def test_values_that_are_no_numbers_survive(tmp_path):
    config = hf_config()
    tensors = random_tensors(config)
    tensors["model.decoder.layers.0.fc2.bias"][1] = float("nan")
    write_hf(tmp_path / "source", config, tensors)
    convert(tmp_path / "source", tmp_path / "m", ConversionOptions("metaseq", 2), fsync=False)
    read = contents(tmp_path / "m")["model.decoder.layers.0.fc2.bias"]
    assert torch.equal(read.view(torch.int16), tensors["model.decoder.layers.0.fc2.bias"].view(torch.int16))


@pytest.mark.parametrize(
    "options",
    [
        {"to": "hf", "decoder_first_pipeline_num_layers": 2},
        {"to": "gguf"},
        {"to": "flagai", "pipeline_model_parallel_size": 2},
    ],
)
def test_options_that_do_not_belong_together(options):
    with pytest.raises(UserError):
        ConversionOptions(**options)


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


# Damaged Megatron directories


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d / "release" / "mp_rank_00"), "1 rank files are there, missing are mp_rank_00"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("soon"), "neither 'release' nor a number"),
        (lambda d: (d / "latest_checkpointed_iteration.txt").write_text("7"), "no directory iter_0000007"),
        (lambda d: (d / "release" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"PK"), "truncated"),
        (lambda d: shutil.copytree(d / "release" / "mp_rank_00", d / "release" / "mp_rank_000"), "are the same rank"),
        (lambda d: edit_config(d, num_hidden_layers=5), "the stages hold 4 layers, the config says 5"),
        (lambda d: edit_config(d, ffn_dim=512), "misshapen"),
    ],
)
def test_damaged_megatron_directory(tmp_path, damage, message):
    convert(EMBEDDED_DIRECTORY, tmp_path / "c", megatron(2), fsync=False)
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
