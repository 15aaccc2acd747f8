"""OPT's byte-level BPE: text to ids with exactly one BOS, ids to text, and text from a stream of ids.

The BPE itself is the `tokenizers` library's, and so is the recognition of added tokens in a text. OPT's own special
tokens are not registered with it on purpose: a `</s>` in a user's text is four characters of text, never an end of
sequence.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import xxhash
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer

from .added_tokens import read_added_tokens
from .errors import CheckpointError, UserError
from .files import read_text

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PAIR = ("vocab.json", "merges.txt")
_METASEQ_PREFIX = "gpt2-"  # of metaseq's names of the pair, whose ids are the same
_NEVER_IN_TEXT = ("<s>", "<pad>", "</s>", "<unk>")
BOS_TOKEN = "</s>"  # OPT begins every sequence with the token that also ends one
_SPECIAL_TOKENS = (BOS_TOKEN, "<pad>")  # of the released models' special_tokens_map.json
UNKNOWN_TOKEN = "<unk>"


class OPTTokenizer:
    """Byte-level BPE with OPT's rules.

    Args:
        vocab: token string -> id.
        merges: pairs of token strings, in order of priority, each of which makes a token of `vocab`.
        added: id -> a token that is found in a text as a whole, before the BPE.

    Attributes:
        added_tokens: the strings of the added tokens that a text may have.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], added: Mapping[int, AddedToken] | None = None
    ) -> None:
        added = added or {}
        self._vocab = vocab | {token.content: index for index, token in added.items()}
        self._merges = merges
        # An added token that is in the vocabulary keeps its id; otherwise the library would number them.
        self._bpe = BPETokenizer(models.BPE(vocab=self._vocab, merges=merges))
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found = [token for token in added.values() if token.content not in _NEVER_IN_TEXT]
        self._bpe.add_tokens(found)
        self.added_tokens = tuple(token.content for token in found)
        self._found = found
        self.bos_token_id = self.eos_token_id = vocab[BOS_TOKEN]
        self.unk_token_id = vocab.get(UNKNOWN_TOKEN)
        self._special_ids = {vocab[token] for token in _SPECIAL_TOKENS if token in vocab}
        self._special_ids |= {index for index, token in added.items() if token.special}
        self._bytes = {index: token.content.encode() for index, token in added.items()} | _token_bytes(vocab)

    @classmethod
    def from_directory(cls, directory: Path) -> Self:
        """Read `vocab.json` and `merges.txt`, or `tokenizer.json` where those are missing, and the added tokens.

        For a file, such as a weight file, the tokenizer files beside it are read. metaseq's names are known too.

        Raises:
            CheckpointError: these files are missing or cannot be read.
        """
        files = tokenizer_files(directory)
        directory = _directory_of(directory)
        try:
            if files.keys() >= set(_PAIR):
                vocab, merges = json.loads(read_text(files[_PAIR[0]])), _read_merges(files[_PAIR[1]])
            elif "tokenizer.json" in files:
                model = json.loads(read_text(files["tokenizer.json"]))["model"]
                vocab = model["vocab"]
                merges = [_pair(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
            else:
                raise CheckpointError(
                    "there is no tokenizer (vocab.json and merges.txt, or tokenizer.json); "
                    "copy the model's there, or give --tokenizer DIR"
                )
            _check_vocabulary(vocab, merges)
            return cls(vocab, merges, read_added_tokens(directory, vocab))
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
        except Exception as error:  # the library raises bare Exception for a vocabulary it cannot use
            raise CheckpointError(f"{directory}: the tokenizer files cannot be used: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides how a text is encoded: tokens and ids, merges, and the added tokens of texts."""
        added = [
            (token.content, token.single_word, token.lstrip, token.rstrip, token.normalized) for token in self._found
        ]
        content = json.dumps([sorted(self._vocab.items()), self._merges, sorted(added)])
        return xxhash.xxh3_128_hexdigest(content.encode())

    def __len__(self) -> int:
        """The highest id plus 1."""
        return max(self._vocab.values()) + 1

    def check_fits(self, vocab_size: int) -> None:
        """Raise UserError if there are more entries than a model has vocabulary rows."""
        if len(self) > vocab_size:
            raise UserError(
                f"the tokenizer has {len(self)} entries and the model {vocab_size} rows: "
                "it is another model's; give --tokenizer DIR"
            )

    def unused_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The ids below `vocab_size` that belong to no token, as the rows that pad a model's vocabulary."""
        return tuple(index for index in range(vocab_size) if index not in self._bytes)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of `text`, after exactly one BOS unless `add_bos` is False."""
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        return [self.bos_token_id, *ids] if add_bos else ids

    def encode_batch(self, texts: Iterable[str], *, add_bos: bool = True) -> list[list[int]]:
        """The ids of each text, as `encode` gives them; other threads run meanwhile."""
        bos = [self.bos_token_id] if add_bos else []
        # One text at a time, because the library's result takes up to 400 times a text's size in memory; and not by
        # its `encode`, which holds the interpreter's lock.
        encodings = (self._bpe.encode_batch([text], add_special_tokens=False)[0] for text in texts)
        return [bos + encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids of padding rows give no text."""
        decoder = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder of ids that arrive one at a time."""
        return StreamDecoder(self._bytes, self._special_ids if skip_special_tokens else set())

    def token_bytes(self, token: int) -> bytes:
        """The bytes of an id: for a special token those of its name, for an unknown id none."""
        return self._bytes.get(token, b"")

    def bad_word_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The ids that write each of the words, as it is and with a space before it (vLLM's `bad_words`)."""
        bare = [word.lstrip(" ") or word for word in words]
        return tuple(tuple(self.encode(text, add_bos=False)) for word in bare for text in (word, " " + word))

    def sentence_end_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that are a full stop, a question mark or an exclamation mark."""
        marks = {b".", b"?", b"!"}
        return tuple(sorted(index for index, text in self._bytes.items() if text.strip(b' "') in marks))

    def identity(self) -> str:
        """A hash of all that ids and texts depend on: equal for equal tokenizers, whatever files they are from."""
        return xxhash.xxh3_128_hexdigest((self._bpe.to_str() + str(sorted(self._special_ids))).encode())

    def get_vocab(self) -> dict[str, int]:
        """Token string -> id, a copy."""
        return dict(self._vocab)


def has_tokenizer(directory: Path) -> bool:
    """Whether `directory` has the files that `OPTTokenizer.from_directory` reads."""
    return _is_complete(tokenizer_files(directory))


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """The tokenizer's files in a directory, or beside a file, by Hugging Face's names.

    metaseq's gpt2-vocab.json and gpt2-merges.txt are taken where there are no others.
    """
    directory = _directory_of(directory)
    files = {name: directory / name for name in TOKENIZER_FILES if (directory / name).is_file()}
    if not _is_complete(files):
        of_metaseq = {name: directory / f"{_METASEQ_PREFIX}{name}" for name in _PAIR}
        if all(path.is_file() for path in of_metaseq.values()):
            files |= of_metaseq
    return files


def _is_complete(files: Mapping[str, Path]) -> bool:
    return files.keys() >= set(_PAIR) or "tokenizer.json" in files


def _directory_of(path: Path) -> Path:
    path = Path(path)
    return path.parent if path.is_file() else path


class StreamDecoder:
    """Decodes ids one at a time, and never gives a part of a character.

    Every token of a byte-level BPE is a sequence of bytes, so this is an incremental UTF-8 decoder.
    """

    def __init__(self, token_bytes: dict[int, bytes], skipped: set[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is complete with `token`; empty in the middle of a character."""
        if token in self._skipped:
            return ""
        return self._utf8.decode(self._token_bytes.get(token, b""))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, else an empty string."""
        return self._utf8.decode(b"", final=True)


def _check_vocabulary(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    # The library panics on a merge whose result is not in the vocabulary; Python code cannot catch that.
    if not isinstance(vocab, dict) or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise CheckpointError("the vocabulary is not a table of tokens and their ids")
    if BOS_TOKEN not in vocab:
        raise CheckpointError(f"the vocabulary has no {BOS_TOKEN!r}, with which every OPT sequence begins")
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(
                f"the merge {' '.join(pair)!r} leads out of the vocabulary; the files do not belong together"
            )


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = read_text(path).split("\n")
    return [_pair(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    if len(parts) != 2:
        raise CheckpointError(
            f"the merge {' '.join(parts)!r} leads out of the vocabulary; the files do not belong together"
        )
    return parts[0], parts[1]


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's table (openai/gpt-2, encoder.py, bytes_to_unicode): printable Latin-1 characters stand for
    # themselves, the other 68 byte values for the characters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable}
    return alphabet | {chr(0x100 + n): value for n, value in enumerate(others)}


def _token_bytes(vocab: dict[str, int]) -> dict[int, bytes]:
    # Latin-1 encodes the characters U+0000 to U+00FF as these bytes, and refuses others: those without a byte.
    no_byte = 0x100
    alphabet = dict.fromkeys(range(0x100), no_byte) | {ord(char): value for char, value in _byte_alphabet().items()}

    def to_bytes(token: str) -> bytes:
        try:
            return token.translate(alphabet).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode("utf-8")  # one that was added to vocab.json as plain text

    return {index: to_bytes(token) for token, index in vocab.items()}
