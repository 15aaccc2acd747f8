"""Perplexity: the windows by eye, the figure against transformers, and the command."""

import gzip
import json
import math

import evaluation_jobs
import pytest
import torch

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main
from opt_megatron.errors import UserError
from opt_megatron.evaluation.data import read_documents
from opt_megatron.evaluation.perplexity import num_windows, tokenize, windows
from opt_megatron.tokenizer import OPTTokenizer

TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
TALES = (
    "Once upon a time there was a king who had three daughters.  \n",
    "The wolf went into the forest. " * 12,
    "An old woman lived alone — with a très clever cat.",
)


def plain(items) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(item.context, item.continuation) for item in items]


def test_consecutive_windows_begin_with_bos_and_fill_all_positions():
    assert plain(windows([10, 11, 12, 13, 14], 2, 2, 2)) == [((2,), (10, 11)), ((2,), (12, 13)), ((2,), (14,))]
    assert plain(windows([10, 11], 4, 4, 2)) == [((2,), (10, 11))]
    assert plain(windows([], 4, 4, 2)) == []


def test_sliding_windows_score_each_token_once_after_what_the_stride_leaves():
    assert plain(windows([10, 11, 12, 13, 14, 15], 4, 2, 2)) == [((2,), (10, 11, 12, 13)), ((2, 12, 13), (14, 15))]
    for context, stride, size in ((8, 3, 50), (8, 1, 9), (5, 4, 23), (7, 7, 7)):
        tokens = list(range(100, 100 + size))
        items = list(windows(tokens, context, stride, 2))
        assert [token for item in items for token in item.continuation] == tokens
        assert all(item.context[0] == 2 and len(item.input_tokens) <= context for item in items)
        assert all(len(item.context) > context - stride for item in items[1:])
        assert len(items) == num_windows(size, context, stride)
    assert num_windows(0, 4, 4) == 0


def test_documents_are_stripped_on_the_right_ended_and_counted_in_bytes():
    documents = tokenize([*TALES, " \n"], TOKENIZER)
    assert len(documents.tokens) == 3 and all(ids[-1] == 2 and 2 not in ids[:-1] for ids in documents.tokens)
    assert documents.num_bytes == sum(len(text.rstrip().encode()) for text in TALES)
    assert tokenize(TALES, TOKENIZER, add_eos=False).tokens == tuple(ids[:-1] for ids in documents.tokens)
    with pytest.raises(UserError, match="no text"):
        tokenize(["", "\n"], TOKENIZER)


def oracle(model, streams, context: int, stride: int) -> float:
    """Nats by transformers, from the definition: each token after BOS and the tokens of its window."""
    total = 0.0
    for stream in streams:
        for begin in range(0, len(stream), stride):
            window = stream[begin : begin + context]
            with torch.no_grad():
                logits = model(torch.tensor([[2, *window[:-1]]])).logits[0]
            own = logits.log_softmax(-1)[range(len(window)), list(window)]
            total -= own[0 if begin == 0 else context - stride :].double().sum().item()
            if begin + context >= len(stream):
                break
    return total


OPTIONS = [
    {},
    {"context": 40, "batch_size": 3},
    {"context": 40, "stride": 15, "batch_size": 5},
    {"context": 64, "concatenate": False},
    {"context": 5, "stride": 1, "batch_size": 1},  # more windows than are made at a time
]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_figure_is_transformers_at_every_layout(models, ranks, tp, pp):
    directory, model = models["story"]
    documents = tokenize(TALES, TOKENIZER)
    joined = [[token for ids in documents.tokens for token in ids]]
    for results in ranks(tp * pp).run(evaluation_jobs.perplexities, directory, tp, pp, documents, OPTIONS):
        for options, result in zip(OPTIONS, results, strict=True):
            streams = joined if options.get("concatenate", True) else documents.tokens
            nats = oracle(model, streams, result.context, result.stride)
            assert result.tokens == len(joined[0]) and result.documents == 3
            assert result.nats_per_token == pytest.approx(nats / result.tokens, abs=1e-5)
            assert result.bits_per_byte == pytest.approx(nats / math.log(2) / documents.num_bytes, abs=1e-5)
            assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))


def test_impossible_windows_are_refused(models, alone):
    from opt_megatron.api import OPT
    from opt_megatron.evaluation.perplexity import perplexity

    opt, documents = OPT.open("story", alone), tokenize(TALES, TOKENIZER)
    with pytest.raises(UserError, match="context is 513, but must be from 1 to the model's 512"):
        perplexity(opt, documents, context=513)
    with pytest.raises(UserError, match="stride is 65, but must be from 1 to the context of 64"):
        perplexity(opt, documents, context=64, stride=65)


def test_files_of_texts(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "a\\u2028b"}\n\n{"text": "c", "body": "d"}\n', encoding="utf-8")
    assert read_documents(lines) == ["a\u2028b", "c"]
    (tmp_path / "X.NDJSON").write_bytes(lines.read_bytes())
    assert read_documents(tmp_path / "X.NDJSON") == read_documents(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    assert read_documents(tmp_path / "x.jsonl.gz") == read_documents(lines)
    whole = tmp_path / "x.txt"
    whole.write_text("a\nb\n", encoding="utf-8")
    assert read_documents(whole) == ["a\nb\n"]
    for content, message in (
        (b'{"text": 3}', "line 1: is not an object with a string under 'text'"),
        (b'{"text": "a"}\n{', "line 2: is not JSON"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"\xff", "not UTF-8"),
    ):
        lines.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_documents(lines)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_documents(tmp_path / "none.txt")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "perplexity", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_command(capsys, tmp_path):
    data = tmp_path / "tales.jsonl"
    data.write_text("".join(json.dumps({"tale": text}) + "\n" for text in TALES), encoding="utf-8")
    arguments = ("--data", str(data), "--json-key", "tale", "--context", "64", "--stride", "32")
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0 and "toy" in err
    result = json.loads(out)
    assert result["stride"] == 32 and result["tokens"] > 100 and result["is_concatenated"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and f"nats a token    {result['nats_per_token']:.4f}\n" in out
    assert "of 64 positions, one every 32 tokens, over the concatenated texts" in out


def test_mistakes_are_one_line(capsys, tmp_path):
    data = tmp_path / "x.txt"
    data.write_text("Once", encoding="utf-8")
    for arguments, message in (
        ((), "--data"),
        (("--data", str(tmp_path / "none.txt")), "cannot be read"),
        (("--data", str(data), "--stride", "0"), "--stride is 0, but must be at least 1"),
        (("--data", str(data), "--context", "9999"), "from 1 to the model's 512 positions"),
    ):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and not out and message in err.strip().splitlines()[-1]
