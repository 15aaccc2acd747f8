"""Training as a user does it: from JSON lines to a model that transformers reads; killed, stopped, and wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from formats import hf_config, random_tensors, write_megatron_lm

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main
from opt_megatron.training.checkpointing.integrity import saved_checkpoints
from opt_megatron.training.metrics import METRICS_FILE

TOOLS = Path(__file__).parents[2] / "tools"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CONFIG = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config, an indexed corpus of the embedded tokenizer, and supervised examples."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    words = ["the", "king", "had", "a", "daughter", "and", "the", "fox", "ran", "into", "the", "wood"]
    texts = [" ".join(words[(3 * n + k) % len(words)] for k in range(60)) for n in range(60)]
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"src": f"The fox is called {n}. It is called", "tgt": f" {n}."} for n in range(40)]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    command = ["--input", directory / "texts.jsonl", "--tokenizer", "story", "--append-eod", "--output-prefix"]
    with pytest.raises(SystemExit) as ended:
        main(["preprocess", *map(str, command), str(directory / "texts")])
    assert ended.value.code == 0
    return directory


def training(data: Path, save: Path, *more: object) -> list[str]:
    """The arguments of a run of thirty steps."""
    arguments = (
        "train", "--config", data / "config.json", "--tokenizer", "story", "--train-data-path",
        data / "texts_text_document", "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 30,
        "--lr", 1e-3, "--log-interval", 1, "--save", save, "--save-interval", 5, *more,
    )  # fmt: skip
    return [str(argument) for argument in arguments]


def losses_of(run_directory: Path) -> list[float]:
    """The training losses, whose steps must be 1, 2, 3 ..."""
    lines = [json.loads(line) for line in (run_directory / METRICS_FILE).read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["iteration"] for line in train] == list(range(1, len(train) + 1))
    return [line["loss"] for line in train]


def test_from_text_to_transformers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--valid-data-path", data / "texts_text_document", "--eval-interval", 15, "--eval-iters", 2)
    boards = ("--tensorboard-dir", tmp_path / "boards")
    pytest.importorskip("tensorboard")
    code, out, err = run(capsys, *training(data, tmp_path / "run", *more, *boards))
    assert (code, out) == (0, f"{tmp_path / 'run'}\n")
    assert "iteration 30/30 | loss" in err and "tokens/s" in err and "iteration 30: validation loss" in err
    assert losses_of(tmp_path / "run")[-1] < losses_of(tmp_path / "run")[0] - 0.3
    assert list((tmp_path / "boards").iterdir())
    code, out, _ = run(capsys, "plot-training", tmp_path / "run", "--output", tmp_path / "loss.png")
    assert code == 0 and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "convert", "--load", tmp_path / "run", "--save", tmp_path / "hf", "--to", "hf")
    assert code == 0, err

    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32").eval()
    code, out, _ = run(
        capsys, "generate", "--load", tmp_path / "run", "--prompt-tokens", "2 7 9", "--temperature", "0",
        "--max-new-tokens", "8", "--ignore-eos", "--json",
    )  # fmt: skip
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([[2, 7, 9]]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1
        )
    assert json.loads(out)["tokens"] == expected[0, 3:].tolist()


def test_fine_tuning_on_pairs_with_lora(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "train", "--load", "story", "--supervised-data", data / "pairs.jsonl", "--supervised-valid-data",
        data / "pairs.jsonl", "--lora-rank", 4, "--seq-length", 64, "--global-batch-size", 2, "--train-iters", 12,
        "--lr", 5e-3, "--eval-interval", 6, "--log-interval", 1, "--hidden-dropout", 0, "--save", tmp_path / "run",
    )  # fmt: skip
    code, _, err = run(capsys, *arguments)
    assert code == 0, err
    assert losses_of(tmp_path / "run")[-1] < losses_of(tmp_path / "run")[0]
    code, _, err = run(capsys, "convert", "--load", tmp_path / "run", "--save", tmp_path / "hf", "--to", "hf")
    assert code == 0, err
    assert not (tmp_path / "hf" / "lora.json").exists()
    code, out, err = run(capsys, "convert", "--load", tmp_path / "run", "--save", tmp_path / "peft", "--to", "peft")
    assert code == 0 and "peft adapter from torch_dist checkpoint iter_0000012 with LoRA" in out, err
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).name == "story-opt" and adapter["r"] == 4
    ask = ("generate", "--prompt", "why", "--temperature", "0", "--max-new-tokens", "8", "--json")
    code, out, err = run(capsys, *ask, "--load", "story", "--adapter", tmp_path / "peft")
    assert code == 0 and out == run(capsys, *ask, "--load", tmp_path / "run")[1] != run(capsys, *ask)[1], err
    further = [tmp_path / "more" if word == tmp_path / "run" else word for word in arguments]
    first = further.index("--lora-rank")
    further[first : first + 2] = ["--adapter", tmp_path / "peft"]
    code, _, err = run(capsys, *further)
    assert code == 0, err
    assert losses_of(tmp_path / "more")[0] < losses_of(tmp_path / "run")[0]
    assert len(json.loads((tmp_path / "more" / "iter_0000012" / "lora.json").read_text())["layers"]) == 16


def test_mezo_with_lora_and_whole_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "train", "--load", "story", "--optimizer", "mezo", "--supervised-data", data / "pairs.jsonl",
        "--supervised-valid-data", data / "pairs.jsonl", "--seq-length", 64, "--global-batch-size", 2, "--train-iters",
        4, "--mezo-epsilon", 1e-2, "--eval-interval", 4, "--log-interval", 1,
    )  # fmt: skip
    ask = ("generate", "--prompt", "why", "--temperature", "0", "--max-new-tokens", "8", "--json")
    answers = [run(capsys, *ask)[1]]
    for name, to, more in (("lora", "peft", ("--lora-rank", 4, "--lr", 1e-2)), ("whole", "hf", ("--lr", 1e-3))):
        save = tmp_path / name
        code, out, err = run(capsys, *arguments, *more, "--save", save)
        assert (code, out) == (0, f"{save}\n"), err
        assert "by MeZO" in err and "| projected gradient " in err and "iteration 4: validation loss" in err
        assert len(losses_of(save)) == 4
        answers.append(run(capsys, *ask, "--load", save)[1])
        code, _, err = run(capsys, "convert", "--load", save, "--save", tmp_path / to, "--to", to)
        assert code == 0, err
        baked = ("--load", tmp_path / to) if to == "hf" else ("--load", "story", "--adapter", tmp_path / to)
        assert run(capsys, *ask, *baked)[1] == answers[-1]
    assert len(set(answers)) == 3
    assert run(capsys, "train", "--config", tmp_path / "lora" / "run.yaml")[0] == 0  # nothing is left to do


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen[str]:
    """The tool in separate processes; the first one's output is read."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(TOOLS / "train.py"), *arguments[1:]]
    return subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def wait_for(run_directory: Path, iterations: int, process: subprocess.Popen[str], saves: int = 0) -> None:
    """Wait until this many steps have been recorded, and so many checkpoints are whole."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_directory / METRICS_FILE
        if (
            path.exists()
            and path.read_text().count("\n") >= iterations
            and len(saved_checkpoints(run_directory)) >= saves
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no {iterations} iterations: {process.communicate(timeout=10)[0][-2000:]}")


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happened to."""
    save = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(training(data, save))
    assert process.wait(120) == 0
    return losses_of(save)


def test_a_run_that_is_killed_twice_goes_on_as_if_nothing_had_been(
    data: Path, tmp_path: Path, uninterrupted: list[float]
) -> None:
    for saves, iterations in ((1, 7), (2, 16)):  # checkpoints are written in the background
        process = start(training(data, tmp_path / "run"))
        wait_for(tmp_path / "run", iterations, process, saves)
        process.kill()
        process.wait(30)
    process = start(training(data, tmp_path / "run"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert losses_of(tmp_path / "run") == uninterrupted
    assert "resumed from" in output
    assert not list((tmp_path / "run").glob(".iter*"))


def test_sigterm_saves_and_exits_with_zero(data: Path, tmp_path: Path, uninterrupted: list[float]) -> None:
    arguments = training(data, tmp_path / "run", "--save-interval", 0)
    process = start(arguments, processes=1)
    wait_for(tmp_path / "run", 3, process)
    for _ in range(20):  # schedulers do not ask once
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    iteration = saved_checkpoints(tmp_path / "run")[0][0]
    assert 3 <= iteration < 30 and f"stopped after iteration {iteration} of 30" in output
    process = start(arguments)
    assert process.wait(120) == 0
    assert losses_of(tmp_path / "run") == uninterrupted


MEZO = ("--load", "story", "--optimizer", "mezo", "--supervised-data", "{data}/pairs.jsonl", "--train-iters", "1",
        "--global-batch-size", "2", "--lr", "1e-3")  # fmt: skip
MISTAKES = [
    (("--config", "{data}/config.json"), "--train-iters is missing"),
    (("--preset", "7b"), "there is no recipe for '7b'"),
    (("--preset", "125m", "--load", "story"), "give one of --preset, --model-config and --load"),
    ((), "give one of --preset, --model-config and --load"),
    (("--preset", "8m"), "give --data-path"),
    (("--preset", "8m", "--bf16", "--fp16"), "exclude each other"),
    (("--preset", "8m", "--lora-rank", "2"), "--lora-rank adapts a trained model"),
    (("--preset", "8m", "--adapter", "{data}"), "--adapter is given without --load"),
    (("--load", "story", "--adapter", "{data}", "--lora-rank", "2"), "leave --lora-rank out"),
    (("--load", "story", "--adapter", "{data}"), "there is no adapter_config.json"),
    (("--preset", "8m", "--lr", "-1"), "--lr is -1.0"),
    (("--preset", "8m", "--seq-length", "4096", "--data-path", "x"), "more than the model's 2048 positions"),
    (("--preset", "8m", "--micro-batch-size", "7", "--data-path", "x"), "cannot be divided"),
    (("--preset", "8m", "--data-path", "{data}/nothing"), "there is no such file"),
    (("--preset", "8m", "--hidden-dropout", "1"), "--hidden-dropout is 1.0"),
    (("--preset", "8m", "--data-path", "x", "--adam-beta1", "1.5"), "--adam-beta1 is 1.5"),
    (("--preset", "8m", "--data-path", "x", "--clip-grad", "-1"), "--clip-grad is -1.0"),
    (("--preset", "8m", "--data-path", "x", "--initial-loss-scale", "0"), "--initial-loss-scale is 0.0"),
    (("--preset", "8m", "--data-path", "x", "--init-method-std", "nan"), "--init-method-std is nan"),
    (("--preset", "8m", "--data-path", "x", "--seq-length", "0"), "--seq-length is 0"),
    (("--load", "story", "--lora-target-modules", "linear_qkv"), "without --lora-rank"),
    (("--preset", "8m", "--valid-data-path", "x"), "not --eval-interval"),
    (("--config", "{data}/config.json", "--tokenizer", "{data}"), "--train-iters is missing"),
    (("--preset", "8m", "--data-path", "x", "--tokenizer", "{data}"), "there is no tokenizer"),
    (("--preset", "8m", "--data-path", "x", "--overlap-param-gather"), "without --use-distributed-optimizer"),
    (("--preset", "8m", "--data-path", "x", "--cross-entropy-loss-fusion"), "give --bf16 too"),
    (("--preset", "8m", "--data-path", "x", "--transformer-impl", "transformer_engine"), "this run is on a CPU"),
    (("--preset", "8m", "--optimizer", "mezo"), "give --load and --supervised-data"),
    (("--load", "story", "--objective", "classification"), "--objective is given without --optimizer mezo"),
    ((*MEZO, "--adam-beta1", "0.5"), "--adam-beta1 is given, which --optimizer mezo does not have"),
    ((*MEZO, "--sequence-parallel"), "--sequence-parallel is given, which --optimizer mezo does not have"),
    ((*MEZO, "--mezo-epsilon", "0"), "--mezo-epsilon is 0.0, but must be a positive number"),
    ((*MEZO, "--hidden-dropout", "0.1"), "trains without dropout"),
    ((*MEZO, "--adapter", "{data}"), "begins with new factors"),
    ((*MEZO, "--objective", "classification"), "has no 'candidates', a list of two or more texts"),
    (("--preset", "8m", "--tensor-model-parallel-size", "2"), "start it with torchrun --nproc-per-node 2"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    save = tmp_path / "run"
    code, out, err = run(capsys, "train", *(word.format(data=data) for word in arguments), "--save", save)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1
    assert not save.exists()


def test_a_diverging_run_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = training(data, tmp_path / "run", "--lr", "1e30", "--max-skipped-iters", "2", "--clip-grad", "0")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "skipped (loss" in err and "the run has diverged" in err.splitlines()[-1]


def test_a_diverging_run_of_mezo_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-skipped-iters", "2", "--lora-rank", "2", "--save", str(tmp_path / "run"), "--save-interval", "1")
    words = [word.format(data=data) for word in (*MEZO, "--train-iters", "9", "--lr", "1e30", *options)]
    code, _, err = run(capsys, "train", *words)
    assert code == 2
    assert "iteration 2: skipped (loss nan" in err and "the run has diverged" in err.splitlines()[-1]
    assert run(capsys, "inspect", tmp_path / "run" / "iter_0000002")[0] == 0  # a skipped step is repeated, too


def test_the_embedded_tokenizer_is_kept_beside_checkpoints(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *training(data, tmp_path / "run", "--exit-iters", "1"))[0] == 0
    saved = saved_checkpoints(tmp_path / "run")[0][1]
    for name in ("vocab.json", "merges.txt"):
        assert (saved / name).read_bytes() == (EMBEDDED_DIRECTORY / name).read_bytes()


def test_a_directory_of_something_else_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in {
        "a/iter_0000002/mp_rank_00/model_optim_rng.pt": "weights",
        "b/metrics.jsonl": "mine\n",
        "c/iter_0000002/.metadata": "Megatron-LM's",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        code, _, err = run(capsys, *training(data, tmp_path / name[0]))
        assert code == 2 and "use another" in err and err.count("\n") == 1
        assert path.read_text() == content
    (tmp_path / "file").touch()
    code, _, err = run(capsys, *training(data, tmp_path / "file"))
    assert code == 2 and "cannot be written" in err and err.count("\n") == 1


def test_two_runs_do_not_write_one_directory(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(training(data, tmp_path / "run", "--train-iters", "3000"))
    try:
        wait_for(tmp_path / "run", 2, process)
        code, _, err = run(capsys, *training(data, tmp_path / "run"))
        assert code == 2 and "another run is writing it just now" in err
    finally:
        process.kill()
        process.wait(30)


def test_a_run_is_repeated_from_its_file_of_options(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    first = training(Path("."), tmp_path / "first", "--train-iters", "6", "--lr-warmup-iters", "2")
    assert run(capsys, *first)[0] == 0
    text = (tmp_path / "first" / "run.yaml").read_text()
    assert f"save: {tmp_path / 'first'}\n" in text and "min_lr: 0.0001\n" in text and "seq_length: 64\n" in text
    assert f"model_config: {data / 'config.json'}\n" in text and f"- {data / 'texts_text_document'}\n" in text
    assert "tokenizer: story\n" in text
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", "--config", "first/run.yaml")
    assert code == 0 and "nothing to do: 6 of 6" in err
    code, out, err = run(capsys, "train", "--config", "first/run.yaml", "--save", "second")
    assert (code, out) == (0, "second\n"), err
    assert losses_of(tmp_path / "second") == losses_of(tmp_path / "first")
    assert (tmp_path / "second" / "run.yaml").read_text() == text.replace(
        f"{tmp_path / 'first'}", f"{tmp_path / 'second'}"
    )


def test_options_of_something_else_are_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("mine: true\n")
    code, _, err = run(capsys, *training(data, tmp_path / "run"))
    assert code == 2 and "holds a run.yaml of something else" in err and err.count("\n") == 1
    assert (tmp_path / "run" / "run.yaml").read_text() == "mine: true\n"


def test_what_cannot_be_resumed_is_reported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "run"
    assert run(capsys, *training(data, save, "--exit-iters", "2"))[0] == 0
    code, _, err = run(capsys, *training(data, save, "--exit-iters", "1"))
    assert code == 0 and "nothing to do: 2 of 30" in err
    other = dict(CONFIG, hidden_size=64, word_embed_proj_dim=64)
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, _, err = run(capsys, *training(data, save, "--config", str(tmp_path / "other.json")))
    assert code == 2 and "hidden_size was 32 and is 64" in err and err.count("\n") == 1
    shard = next(saved_checkpoints(save)[0][1].glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = (save / METRICS_FILE).read_text()
    code, _, err = run(capsys, *training(data, save))
    assert code == 2 and "none of its 1 checkpoints is whole" in err
    assert (save / METRICS_FILE).read_text() == before


def test_a_diverging_run_keeps_what_it_had_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--lr", "1e30", "--max-skipped-iters", "2", "--clip-grad", "0", "--save-interval", "1")
    assert run(capsys, *training(data, tmp_path / "run", *arguments))[0] == 2
    assert saved_checkpoints(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".iter*"))


def test_steps_that_are_always_skipped_end_an_fp16_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--fp16", "--skip-grad-norm", "1e-6", "--max-skipped-iters", "3")
    code, _, err = run(capsys, *training(data, tmp_path / "run", *arguments))
    assert code == 2 and "3 iterations in a row were skipped" in err


def test_a_run_is_loaded_with_its_tokenizer(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *training(data, tmp_path / "run", "--exit-iters", "1"))[0] == 0
    code, out, err = run(
        capsys, "generate", "--load", tmp_path / "run", "--prompt", "the king", "--max-new-tokens", "2"
    )
    assert code == 0 and out.startswith("the king"), err
    more = training(data, tmp_path / "next", "--exit-iters", "1")
    for flag in ("--config", "--tokenizer"):
        del more[more.index(flag) : more.index(flag) + 2]
    assert run(capsys, *more, "--load", tmp_path / "run")[0] == 0
    assert (saved_checkpoints(tmp_path / "next")[0][1] / "vocab.json").is_file()


def test_what_is_assumed_of_a_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = hf_config(vocab_size=32)
    write_megatron_lm(tmp_path / "source", config, random_tensors(config), 2, 1)
    command = ("train", "--load", tmp_path / "source", "--train-data-path", tmp_path / "absent")
    code, _, err = run(capsys, *command)
    assert code == 2 and "the activation is assumed to be ReLU" in err  # and then that the batch size is missing
    code, _, err = run(capsys, *command, "--activation", "relu")
    assert code == 2 and "4 attention heads from args" in err and "ReLU" not in err
