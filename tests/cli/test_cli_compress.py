"""`opt-megatron compress`: what it prints, and mistakes."""

import pytest

from opt_megatron.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["compress", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_command(capsys, tmp_path):
    text = tmp_path / "tales.txt"
    text.write_text("There was once a king who had three sons. " * 30)
    calibration = ("--calibration-data", str(text), "--calibration-samples", "2", "--calibration-length", "32")
    arguments = ("--load", "story", "--save", str(tmp_path / "out"), "--recipe", "wanda-2:4", *calibration)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith(f"wrote {tmp_path}/out: prune of 24 linears, 50.00% zeros, in ")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "is a checkpoint already; --force replaces it" in err
    assert run(capsys, *arguments, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "gptq4"), "--save"),
        (("--save", "x", "--recipe", "gptq4"), "the recipe needs calibration: give --calibration-data"),
        (("--save", "x", "--recipe", "gptq9"), "is no ready recipe (int8"),
        (("--save", " ", "--recipe", "int8"), "--save is empty"),
        (("--save", "x", "--recipe", "int8", "--dtype", "int8"), "int8"),
        (("--save", "x", "--recipe", "int8", "--calibration-samples", "0"), "--calibration-samples is 0"),
        (("--save", "x", "--recipe", "int8", "--tensor-model-parallel-size", "2"), "tensor 2 x pipeline 1 = 2"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and message in err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
