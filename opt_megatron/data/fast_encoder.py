"""Tokenization of large corpora, several times as fast as `OPTTokenizer.encode` on ordinary text."""

from __future__ import annotations

import re
from itertools import chain

import regex

from ..tokenizer import OPTTokenizer


class FastEncoder:
    """Gives the ids of `OPTTokenizer.encode` without BOS, from a cache of words.

    Byte-level BPE never merges across the pieces into which GPT-2's pattern splits a text, and most pieces of a
    text have occurred before: their ids are looked up. The pattern is GPT-2's (openai/gpt-2, encoder.py), as in
    the tokenizers library. `regex` and that library agree on the classes of all characters of the common blocks
    (a test compares them one by one). A text with any other character is tokenized by the library as a whole,
    because one of the two may not know that character yet and classify it differently. So is a text that may have an
    added token.
    """

    _PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    # Latin, Greek, Cyrillic with their extensions; punctuation, currencies, symbols; kana, ideographs, Hangul,
    # full width; emoji.
    COMMON = (
        "\x00-\u052f\u1e00-\u206f\u20a0-\u20bf\u2100-\u214f\u2190-\u22ff\u2500-\u25ff"
        "\u3000-\u30ff\u4e00-\u9fef\uac00-\ud7a3\uff00-\uffef\U0001f300-\U0001f64f"
    )
    _RARE = re.compile(f"[^{COMMON}]")

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache = _PieceCache(tokenizer)
        added = "|".join(map(re.escape, tokenizer.added_tokens))
        self._added = re.compile(added) if added else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS."""
        is_rare = not text.isascii() and self._RARE.search(text)
        if is_rare or (self._added is not None and self._added.search(text)):
            return self._tokenizer.encode(text, add_bos=False)
        return list(chain.from_iterable(map(self._cache.__getitem__, self._PIECES.findall(text))))


class _PieceCache(dict[str, tuple[int, ...]]):
    """Piece -> ids; cleared when it is full, so that its memory is bounded."""

    _MAX_ENTRIES = 2**18
    _MAX_CHARACTERS = 32

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(piece, add_bos=False))
        if len(piece) <= self._MAX_CHARACTERS:
            if len(self) >= self._MAX_ENTRIES:
                self.clear()
            self[piece] = ids
        return ids
