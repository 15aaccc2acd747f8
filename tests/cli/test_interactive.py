"""opt-megatron generate --interactive: turns, undo, options, and mistakes that do not end it."""

import io
import sys

import pytest

from opt_megatron.cli import main


def converse(capsys, monkeypatch, lines: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call with these lines as its input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--temperature", "0", "--max-new-tokens", "6", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_turns_continue_one_text_which_undo_takes_back(capsys, monkeypatch):
    _, whole, _ = converse(capsys, monkeypatch, "", "--prompt", "Once upon a time", "--max-new-tokens", "12")
    code, out, _ = converse(capsys, monkeypatch, "Once upon a time\n\n/text\n/undo\n\n/quit\nnever", "--interactive")
    first, second, text, undone, again = out.splitlines()
    assert code == 0
    assert "Once upon a time" + first + second == text == whole.rstrip("\n")
    assert undone == "Once upon a time" + first and again == second


def test_options_change_and_mistakes_change_nothing(capsys, monkeypatch):
    lines = "\n/set max-new-tokens 1\n/set n 2\n/set temperatur 1\n/sing\n/undo\n"
    lines += "a\\nb\n/set max_new_tokens 9999\nc\n/text\n/options\n/new\n/text\n"
    code, out, err = converse(capsys, monkeypatch, lines, "--interactive")
    assert code == 0
    continuation, *rest = out.splitlines()
    assert rest == ["a", f"b{continuation}", "max_new_tokens 9999", "temperature 0.0"]
    problems = [line.removeprefix("opt-megatron: ") for line in err.splitlines() if "toy" not in line]
    expected = [
        "there is no text yet",
        "n is 2",
        "/set: there is no option 'temperatur'",
        "there is no command /sing",
    ]
    expected += ["there is nothing to undo", "request 1 has"]
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))


def test_it_takes_no_other_prompts(capsys, monkeypatch):
    code, _, err = converse(capsys, monkeypatch, "", "--interactive", "--prompt", "Once")
    assert code == 2 and "--interactive and --prompt are given; use one of them" in err
