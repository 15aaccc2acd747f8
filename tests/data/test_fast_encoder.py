"""The fast encoder gives the same ids as the tokenizer, for any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.data import fast_encoder
from opt_megatron.data.fast_encoder import FastEncoder
from opt_megatron.tokenizer import OPTTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)


def test_every_common_character_is_classed_as_the_library_classes_it(tokenizer: OPTTokenizer) -> None:
    encoder = FastEncoder(tokenizer)
    common = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000 and not FastEncoder._RARE.match(chr(n))]
    assert len(common) > 36_000
    for start in range(0, len(common), 64):
        # Beside a letter, a digit, a mark and white space, which show its class; apart, so that none hides another.
        text = "".join(f"a{c}b1{c}2 {c}!{c}{c} x\n" for c in common[start : start + 64])
        assert encoder.encode(text) == tokenizer.encode(text, add_bos=False), hex(ord(common[start]))


@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a1 '\n\tsé")), max_size=60))
@settings(deadline=None, max_examples=300)
def test_fast_ids_are_the_tokenizers(tokenizer: OPTTokenizer, text: str) -> None:
    assert FastEncoder(tokenizer).encode(text) == tokenizer.encode(text, add_bos=False)


def test_the_cache_of_pieces_is_bounded(tokenizer: OPTTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_encoder._PieceCache, "_MAX_ENTRIES", 10)
    encoder = FastEncoder(tokenizer)
    text = " ".join(map(str, range(300))) + " " + "y" * 100
    assert encoder.encode(text) == tokenizer.encode(text, add_bos=False)
    assert 0 < len(encoder._cache) <= 10 and "y" * 100 not in encoder._cache
