"""opt-megatron detect as a user calls it: texts, ids, files, mistakes."""

import gzip
import io
import json
import sys

import pytest

from opt_megatron import OPT
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main
from opt_megatron.errors import UserError

KEY = {"watermark_key": 271828183}


@pytest.fixture(scope="module")
def opt(alone):
    return OPT.open("story", alone)


@pytest.fixture(scope="module")
def completions(opt):
    """A marked text and one that is not."""
    options = {"max_new_tokens": 120, "seed": 3, "ignore_eos": True}
    return [
        opt.generate("Once upon a time", **options, watermark_delta=3.0, **KEY)[0],
        opt.generate("Once upon a time", **options)[0],
    ]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["detect", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_texts_ids_and_files_are_scored_as_in_python(opt, completions, capsys, tmp_path, monkeypatch):
    marked, plain = opt.detect([completion.tokens for completion in completions], **KEY)
    assert marked.is_watermarked and marked.p_value < 1e-9 and not plain.is_watermarked
    key = ("--watermark-key", str(KEY["watermark_key"]))
    arguments = [word for each in completions for word in ("--tokens", " ".join(map(str, each.tokens)))]
    lines = [json.loads(line) for line in run(capsys, *key, *arguments, "--json")[1].splitlines()]
    assert [(line["is_watermarked"], line["z_score"]) for line in lines] == [
        (True, marked.z_score),
        (False, plain.z_score),
    ]
    assert [line["source"] for line in lines] == ["tokens 1", "tokens 2"]

    text = completions[0].text
    (of_text,) = opt.detect(text, **KEY)
    shown = f"z {of_text.z_score:.3f}, p {of_text.p_value:.3g}\n"
    _, out, err = run(capsys, *key, "--text", text)
    assert out.startswith("text 1: marked: ") and out.endswith(shown) and "no --load" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert run(capsys, *key)[1] == out.replace("text 1", "standard input")
    assert "not marked" in run(capsys, "--text", text)[1]  # by another key

    path = tmp_path / "texts.jsonl.gz"
    rows = [{"text": text}, {"text": "."}, {"other": 1}, {"text": list(completions[1].tokens)}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    code, out, err = run(capsys, *key, "--input", str(path))
    assert code == 0 and [line.split(": ")[:2] for line in out.splitlines()] == [
        [f"{path}:1", "marked"], [f"{path}:4", "not marked"],
    ]  # fmt: skip
    assert "skipped 2 bad lines" in err and f"{path}:2: the text is too short" in err and "has no 'text'" in err
    code, out, err = run(capsys, *key, "--input", str(path), "--strict")
    assert (code, out) == (2, "") and ":2: the text is too short" in err


def test_a_tokenizer_is_enough(completions, capsys):
    tokenizer = ("--tokenizer", str(EMBEDDED_DIRECTORY), "--text", completions[0].text)
    _, with_model, _ = run(capsys, "--load", "story", *tokenizer)
    assert run(capsys, *tokenizer, "--watermark-vocab-size", "4096")[1] == with_model
    code, _, err = run(capsys, *tokenizer)
    assert code == 2 and "add --watermark-vocab-size, which is 50272 for OPT" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--tokens", "5 6"], "--text and --tokens are given; use one of them"),
        (["--text", ""], "text 1 is too short: of 2 tokens, the last can be scored, and it has 0"),
        (["--tokens", "5 4096"], "tokens 1 holds the id 4096, but ids go from 0 to 4095"),
        (["--tokens", "five"], "--tokens 1: 'five' is not a list of whole numbers"),
        (["--tokens", "5 6", "--watermark-gamma", "1"], "watermark_gamma is 1.0, but must be above 0 and below 1"),
        (["--tokens", "5 6", "--watermark-vocab-size", "5000"], "but the model has 4096 ids"),
        (["--input", "/nowhere"], "/nowhere: cannot be read"),
        (["--load", "/nowhere", "--text", "a"], "there is no such directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]


def test_mistakes_in_python(opt):
    for options, message in (
        ({"watermark_delta": 1}, "detect: got an unexpected keyword argument 'watermark_delta'"),
        ({"watermark_key": 1.5}, "watermark_key is 1.5, but must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            opt.detect("a text", **options)
    with pytest.raises(UserError, match="text 2 holds the id 9999"):
        opt.detect([[5, 6], [5, 9999]])
