"""The tokenizer: ids equal to transformers', one BOS, and streams that never show half a character."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.data.fast_encoder import FastEncoder
from opt_megatron.errors import CheckpointError
from opt_megatron.tokenizer import OPTTokenizer, has_tokenizer, tokenizer_files

TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
ORACLE = AutoTokenizer.from_pretrained(EMBEDDED_DIRECTORY)
TEXTS = ["Once upon a time", "  two  spaces\n\nand\ttabs", "naïve — “quotes” 日本語 😀👩‍👩‍👧", "x" * 300, "don't 12345"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(text):
    assert TOKENIZER.encode(text) == ORACLE(text)["input_ids"]


def test_exactly_one_bos():
    ids = TOKENIZER.encode("a king")
    assert ids[0] == 2 and ids.count(2) == 1
    assert TOKENIZER.encode("a king", add_bos=False) == ids[1:]
    assert TOKENIZER.encode("") == [2]
    for add_bos in (True, False):
        assert TOKENIZER.encode_batch(TEXTS, add_bos=add_bos) == [TOKENIZER.encode(t, add_bos=add_bos) for t in TEXTS]


def test_special_tokens_in_user_text_are_plain_text():
    ids = TOKENIZER.encode("</s><pad>", add_bos=False)
    assert not {0, 1, 2, 3} & set(ids)
    assert TOKENIZER.decode(ids) == "</s><pad>"


def test_special_tokens_of_the_model_are_not_text():
    king = TOKENIZER.encode("king", add_bos=False)
    assert TOKENIZER.decode([2, *king, 2, 1]) == "king"
    assert TOKENIZER.decode([2, *king], skip_special_tokens=False) == "</s>king"
    assert TOKENIZER.decode([*king, 999_999]) == "king"  # a padding row of the vocabulary


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_text_survives_encoding_and_streaming(text):
    stream = TOKENIZER.stream()
    pieces = [stream.push(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_half_a_character_is_held_back_until_it_is_whole():
    ids = TOKENIZER.encode("😀", add_bos=False)
    assert len(ids) > 1
    stream = TOKENIZER.stream()
    assert [stream.push(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]
    unfinished = TOKENIZER.stream()
    assert unfinished.push(ids[0]) == "" and unfinished.flush() == "\ufffd"


def test_metaseqs_names(tmp_path):
    for name, path in tokenizer_files(EMBEDDED_DIRECTORY).items():
        shutil.copyfile(path, tmp_path / f"gpt2-{name}")
    assert has_tokenizer(tmp_path) and tokenizer_files(tmp_path).keys() == {"vocab.json", "merges.txt"}
    assert OPTTokenizer.from_directory(tmp_path).fingerprint == TOKENIZER.fingerprint


def test_a_vocabulary_that_git_lfs_has_not_fetched(tmp_path):
    shutil.copytree(EMBEDDED_DIRECTORY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json: cannot be read: is a git-lfs pointer"):
        OPTTokenizer.from_directory(tmp_path)


def test_tokenizer_json_alone_is_enough(tmp_path):
    ORACLE.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert OPTTokenizer.from_directory(tmp_path).encode(TEXTS[2]) == TOKENIZER.encode(TEXTS[2])


ADDED = (
    "<|user|>",
    "<|end|>",
    AddedToken("<fill>", lstrip=True, rstrip=True),
    AddedToken("king", single_word=True),
    "two words",
    "日本",
)


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """Tokenizers with added tokens, two of them special: transformers', and ours of each way to store it."""
    oracle = AutoTokenizer.from_pretrained(EMBEDDED_DIRECTORY)
    oracle.add_special_tokens({"additional_special_tokens": list(ADDED[:2])})
    oracle.add_tokens(list(ADDED[2:]))
    tokens = {index: token.__getstate__() for index, token in oracle.added_tokens_decoder.items()}
    read = {}
    for way in ("tokenizer.json", "added_tokens_decoder"):
        directory = tmp_path_factory.mktemp("added")
        oracle.save_pretrained(directory)
        for name in ("vocab.json", "merges.txt"):
            (directory / name).write_bytes((EMBEDDED_DIRECTORY / name).read_bytes())
        if way == "added_tokens_decoder":
            (directory / "tokenizer.json").unlink()
            config = json.loads((directory / "tokenizer_config.json").read_text())
            (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": tokens}))
        read[way] = OPTTokenizer.from_directory(directory)
    return oracle, read


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*map(str, ADDED), " ", "x", "kings", "é ", "\n"]), max_size=12))
def test_added_tokens_are_those_of_transformers(added, parts):
    oracle, read = added
    text = "".join(parts)
    ids = oracle(text)["input_ids"]
    for tokenizer in read.values():
        assert tokenizer.encode(text) == ids
        assert FastEncoder(tokenizer).encode(text) == ids[1:]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
        assert len(tokenizer) == len(oracle) == 4101 and tokenizer.unused_ids(4103) == (4101, 4102)


def test_added_tokens_in_the_older_files(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((EMBEDDED_DIRECTORY / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": 4100, "naïve": 4098}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<sep>", "mask_token": "<new>"}))
    tokenizer = OPTTokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("naïve<sep><new></s>")
    assert ids[:4] == [2, 4098, 4100, 4101] and 2 not in ids[1:]  # <new> got the next id; </s> is text
    assert tokenizer.decode(ids) == "naïve</s>" and tokenizer.token_bytes(4100) == b"<sep>"
    assert tokenizer.unused_ids(4102) == (4096, 4097, 4099)
    listed = {"4099": {"content": "<sep>", "special": False}, "4098": {"content": "x y"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, "sep_token": "<sep>"}))
    tokenizer = OPTTokenizer.from_directory(tmp_path)  # added_tokens.json does not count any more
    assert tokenizer.encode("x y<sep>", add_bos=False) == [4098, 4099] and tokenizer.decode([4098, 4099]) == "x y"
    (tmp_path / "tokenizer_config.json").unlink()
    for tokens, message in (({"<sep>": 2}, "'</s>' has it"), ({"Ġking": 5000}, "the id 5000, but it has the id"),
                            ({"<x>": -1}, "the id -1; ids begin at 0"),
                            ({"": 5000}, "has no text"), (["x"], "holds a list")):  # fmt: skip
        (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
        with pytest.raises(CheckpointError, match=message):
            OPTTokenizer.from_directory(tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        OPTTokenizer.from_directory(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for vocab, message in (
        ({"a": 0, "b": 1}, "has no '</s>'"),
        ({"a": 0, "b": 1, "</s>": 2}, "the merge 'a b' leads out of the vocabulary"),
        ({"a": "0", "</s>": 2}, "not a table of tokens"),
        ({"a": {}}, "not a table of tokens"),
    ):
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(CheckpointError, match=message):
            OPTTokenizer.from_directory(tmp_path)
