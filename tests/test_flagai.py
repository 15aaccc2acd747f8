"""FlagAI's two scripts for OPT, each in separate processes, and the semantics of its predictor."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.errors import UserError
from opt_megatron.flagai import AutoLoader, Predictor

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def start(script: str, *args: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPTS / script), *args]
    return subprocess.Popen(
        command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_quick_start_script():
    output = finish(start("flagai_quick_start.py", str(EMBEDDED_DIRECTORY)))
    head, _, continuation = output.partition("\n out is ")
    assert head == "input is The trophy doesn’t fit in the suitcase because I think "
    assert len(continuation.split()) > 20


def test_model_parallel_script_on_two_ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        start("flagai_model_parallel.py", "--local_rank", rank, str(EMBEDDED_DIRECTORY), MASTER_PORT=port)
        for rank in "01"
    ]
    first, second = (finish(process) for process in processes)
    assert first.startswith("building model...\npred is ") and len(first.split()) > 20
    assert second == "building model...\n"  # rank 0 alone prints


@pytest.fixture(scope="module")
def predictor(alone):
    loader = AutoLoader("lm", model_name="opt-125m-en", model_dir=str(EMBEDDED_DIRECTORY))
    return Predictor(loader.get_model(), loader.get_tokenizer())


def test_torchs_seed_repeats_a_result_and_calls_differ(predictor):
    def run():
        return predictor.predict_generate_randomsample("The king", out_max_length=20)

    torch.manual_seed(123)
    first, second = run(), run()
    torch.manual_seed(123)
    assert run() == first != second


def test_integer_and_zero_temperature_are_no_errors(predictor):
    options = {"out_max_length": 12, "repetition_penalty": 2}
    greedy = [predictor.predict_generate_randomsample("The king", temperature=t, **options) for t in (0, 0)]
    assert greedy[0] == greedy[1]
    assert predictor.predict_generate_randomsample("The king", temperature=1, **options)


def test_the_prompts_end_is_dropped_beyond_input_max_length(predictor):
    def run(text, length):
        return predictor.predict_generate_randomsample(text, input_max_length=length, out_max_length=9, temperature=0)

    tokenizer = predictor._tokenizer
    text = "The king had a daughter who was as beautiful as the day"
    kept = tokenizer.decode(tokenizer.encode(text, add_bos=False)[:4])
    assert run(text, 4) == run(kept, 256) != run(text, 256)


def test_the_continuation_ends_where_the_positions_do(predictor, capfd):
    text = "word " * 300
    out = predictor.predict_generate_randomsample(text, input_max_length=500, out_max_length=300, temperature=0)
    assert out and "is cut to the" in capfd.readouterr().err
    with pytest.raises(UserError, match="lower input_max_length to 510"):
        predictor.predict_generate_randomsample("word " * 600, input_max_length=600)


def test_beam_search_is_transformers_and_contrastive_search_runs(models, predictor):
    _, oracle = models["story"]
    tokenizer = predictor._tokenizer
    ids = torch.tensor([tokenizer.encode("The king had a daughter")])
    found = oracle.generate(ids, num_beams=3, do_sample=False, max_new_tokens=9, early_stopping=False)[0, ids.size(1) :]
    beams = predictor.predict_generate_beamsearch("The king had a daughter", out_max_length=9, beam_size=3)
    assert beams == tokenizer.decode(found.tolist())
    greedy = predictor.predict_generate_beamsearch("The king had a daughter", out_max_length=9)
    assert greedy == predictor.predict_generate_randomsample("The king had a daughter", out_max_length=9, temperature=0)
    contrastive = predictor.predict_generate_contrastive_search
    assert contrastive("The king had a daughter", out_max_length=9) == greedy
    assert contrastive("The king had a daughter", out_max_length=9, beam_size=4) not in (greedy, "")
    with pytest.raises(UserError, match="beam_size is 0"):
        contrastive("The king had a daughter", beam_size=0)


def test_tokens_instead_of_a_text(predictor):
    ids = predictor._tokenizer.encode_plus("The king had a daughter", max_length=3)["input_ids"]
    assert ids == predictor._tokenizer.encode("The king had a daughter")[:4]
    run = predictor.predict_generate_randomsample
    options = {"out_max_length": 9, "temperature": 0}
    by_ids = run("ignored", prompts_tokens=[ids], **options)
    assert by_ids == run("The king had a daughter", input_max_length=3, **options)
    with pytest.raises(UserError, match="prompts_tokens has 2 prompts"):
        run("ignored", prompts_tokens=[ids, ids])


def test_the_checkpoints_directory_is_looked_at_first(tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED_DIRECTORY, tmp_path / "checkpoints" / "opt-1.3b-en")
    model = AutoLoader("seq2seq", "opt-1.3b-en", torch_dtype=torch.bfloat16, device="cpu").get_model()
    assert model.opt_config.num_layers == 4 and model.params_dtype == torch.bfloat16


def test_the_config_alone_gives_initial_weights(tmp_path, alone):
    directory = tmp_path / "opt-125m-en"
    directory.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copy(EMBEDDED_DIRECTORY / name, directory)
    loader = AutoLoader("lm", "opt-125m-en", str(tmp_path), only_download_config=True)
    weight = loader.get_model().decoder.layers[0].mlp.linear_fc1.weight
    assert weight.std().item() == pytest.approx(0.006, rel=0.05) and loader.get_model() is loader.get_model()
    assert Predictor(loader.get_model(), loader.get_tokenizer()).predict_generate_beamsearch("The king", 8, 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"task_name": "cls"}, "'cls': OPT's tasks are 'lm' and 'seq2seq'"), ({"torch_dtype": "int8"}, "int8")],
)
def test_what_cannot_be_is_refused(options, error, alone):
    with pytest.raises(UserError, match=error):
        AutoLoader(**{"model_dir": str(EMBEDDED_DIRECTORY)} | options).get_model()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="load_pretrain_param"):
        AutoLoader("lm", model_name="opt-125m-en", load_pretrain_param=True)
