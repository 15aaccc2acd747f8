"""A command line, a file of options and the defaults, in this order."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from opt_megatron.cli import COMMANDS, _parse, main
from opt_megatron.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of options for `generate`."""
    path = tmp_path / "run.yaml"
    path.write_text("max-new-tokens: 5\ntop_p: 0.5\nstop: [end]\nignore_eos: true\ntensor_model_parallel_size: 2\n")
    return path


def test_the_command_line_goes_before_the_file_and_that_before_the_defaults(file: Path) -> None:
    args = _parse(["generate", "--top-p", "0.9", "--config", str(file), "--stop", "a", "--stop", "b"])
    assert (args.top_p, args.max_new_tokens, args.top_k) == (0.9, 5, 0)
    assert (args.stop, args.ignore_eos, args.tensor_model_parallel_size) == (("a", "b"), True, 2)
    assert not hasattr(args, "from_file") and args.model_config is None


def test_a_switch_of_the_file_is_turned_off_on_the_command_line(file: Path) -> None:
    assert not _parse(["generate", "--config", str(file), "--no-ignore-eos"]).ignore_eos
    file.write_text("load: a\nsave: b\nno_fsync: true\n")
    assert _parse(["convert", "--config", str(file)]).no_fsync
    assert not _parse(["convert", "--config", str(file), "--fsync"]).no_fsync


def test_a_required_option_may_stand_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yml"
    path.write_text("data: texts.jsonl\nbatch_size: 2\n")
    args = _parse(["evaluate", "perplexity", "--config", str(path)])
    assert (args.data, args.batch_size, args.json_key) == ("texts.jsonl", 2, "text")
    path.write_text("batch_size: 2\n")
    with pytest.raises(UserError, match="the following arguments are required: --data"):
        _parse(["evaluate", "perplexity", "--config", str(path)])


def test_later_files_go_before_earlier_ones_and_other_files_are_the_models_config(file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("top_p: 0.25\n")
    args = _parse(["generate", "--config", str(file), "--config", str(second), "--config", "config.json"])
    assert (args.top_p, args.max_new_tokens, args.model_config) == (0.25, 5, "config.json")
    assert _parse(["inspect", "x", "--model-config", "somewhere"]).model_config == "somewhere"
    file.write_text("model_config: tiny.json")
    assert _parse(["serve", "--config", str(file)]).model_config == "tiny.json"


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("generate", "top_q: 1", "run.yaml: there is no option 'top_q'; did you mean top_p or top_k"),
        ("generate", "config: other.yaml", "run.yaml: there is no option 'config'"),
        ("generate", "top_p: 2", "run.yaml: top_p is 2, but must be from 0 (greedy) to 1"),
        ("serve", "port: http", "run.yaml: port is 'http', but must be a whole number"),
        ("train", "lr: -1", "run.yaml: lr is -1, but must be positive"),
        ("train", "bf16: 1", "run.yaml: bf16 is 1, but must be true or false"),
    ],
)
def test_mistakes_in_the_file_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([command, "--config", str(tmp_path / "run.yaml")])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1) and message in err


def test_the_home_directory_is_put_for_the_tilde_of_paths_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_text("prompt_file: ~/texts\nprompt: [~/a]\n")
    args = _parse(["generate", "--config", "~/run.yaml", "--load", "~/model", "--tokenizer", "a~"])
    assert (args.prompt_file, args.load) == (f"{tmp_path}/texts", f"{tmp_path}/model")
    assert (args.prompt, args.tokenizer) == (("~/a",), "a~")
    assert _parse(["train", "--data-path", "0.5", "~/corpus"]).data_path == ("0.5", f"{tmp_path}/corpus")


def test_no_option_of_a_file_is_read_as_another_ones_abbreviation(file: Path) -> None:
    file.write_text("max_new: 3")
    with pytest.raises(UserError, match="did you mean max_new_tokens"):
        _parse(["generate", "--config", str(file)])


@pytest.mark.parametrize(
    ("is_connected", "run_id", "says_so"), [(False, "", True), (True, "", False), (True, "7", True)]
)
def test_a_rank_that_alone_lacks_the_file_says_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_connected: bool,
    run_id: str,
    says_so: bool,
) -> None:
    """A connected rank raises what the leader reports, but torchrun would have ended it with the leader."""
    monkeypatch.setattr("opt_megatron.cli._SECONDS_FOR_THE_LEADER", 0)
    monkeypatch.setattr("opt_megatron.cli._has_other_ranks", lambda: is_connected)
    monkeypatch.setenv("RANK", "1")
    if run_id:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(tmp_path / "none.yaml")])
    err = capsys.readouterr().err
    assert (err.startswith("opt-megatron: error: rank 1: "), err.count("\n")) == (says_so, says_so)


@pytest.mark.parametrize("name", [*COMMANDS, "evaluate_perplexity", "evaluate_lm_eval"])
def test_the_examples_of_help_are_command_lines_of_today(name: str) -> None:
    example = importlib.import_module(f"opt_megatron.cli.{name.replace('-', '_')}").EXAMPLE
    assert _parse(shlex.split(example)[1:]).command == name.split("_")[0]


@pytest.mark.parametrize("arguments", [["generate", "--temp=0"], ["evaluate", "perplexity", "--data", "a", "--js"]])
def test_abbreviations_are_no_arguments(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=f"unrecognized arguments: {arguments[-1]}"):
        _parse(arguments)
