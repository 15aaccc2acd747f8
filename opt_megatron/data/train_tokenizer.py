"""Training a byte-level BPE with OPT's ids: four special tokens, the 256 bytes, then the merges.

The special tokens have OPT's ids (fairseq's order) and take no part in the merges: in a text, `</s>` is four
characters, which GPT-2's pattern splits into three pieces.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ..errors import UserError
from ..files import PartialDirectory
from ..tokenizer import TOKENIZER_FILES, OPTTokenizer
from .jsonl import BadLines, check_inputs, read_texts

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
LARGEST_VOCABULARY = 2**24  # the library allocates memory for it in advance
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
_MIN_FREQUENCY = 2  # a pair that occurs once is not worth an entry
# The contents of facebook/opt-125m's special_tokens_map.json and tokenizer_config.json.
_ROLES = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_CONFIG = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **_ROLES}


@dataclass
class TokenizerTrainingResult:
    """What a tokenizer was trained on, and the size of its vocabulary."""

    vocab_size: int = 0
    texts: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    bad: BadLines = field(default_factory=BadLines)


def train_tokenizer(
    inputs: Sequence[str],
    output: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    strict: bool = False,
    force: bool = False,
    show_progress: bool = False,
) -> TokenizerTrainingResult:
    """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json to the directory `output`.

    The same texts give the same files. A small corpus may hold too few pairs for `vocab_size`; the vocabulary is
    then smaller, which the result shows.

    Args:
        inputs: JSON lines, each an object with a text under `json_key`; also `.gz`.
        vocab_size: special tokens and bytes included.
        force: replace a tokenizer that is in the directory; other files there are kept.

    Raises:
        UserError: a size below 260, files that cannot be read, no text in them, a tokenizer there without `force`.
    """
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size is {vocab_size}, more than the {LARGEST_VOCABULARY} that are allowed here")
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size is {vocab_size}, but 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"take {SMALLEST_VOCABULARY} already"
        )
    check_inputs(inputs)
    _check_output(output, force)
    result = TokenizerTrainingResult()
    started = time.monotonic()
    bpe = _train(_count(read_texts(inputs, json_key, result.bad, strict=strict), result), vocab_size, show_progress)
    if not result.texts:
        raise UserError("; ".join(["the input holds no texts", *result.bad.report()]))
    result.vocab_size = bpe.get_vocab_size()
    result.seconds = time.monotonic() - started
    _write(bpe, output)
    return result


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, not a directory")
    present = [name for name in TOKENIZER_FILES if (output / name).exists()]
    if present and not force:
        raise UserError(f"{output}: holds a tokenizer already ({', '.join(present)}); --force replaces it")


def _count(texts: Iterator[str], result: TokenizerTrainingResult) -> Iterator[str]:
    for text in texts:
        result.texts += 1
        result.text_bytes += len(text.encode())
        yield text


def _train(texts: Iterator[str], vocab_size: int, show_progress: bool) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _write(bpe: Tokenizer, output: Path) -> None:
    with PartialDirectory(output) as partial:
        bpe.model.save(str(partial.path))
        for name, content in (("tokenizer_config.json", _CONFIG), ("special_tokens_map.json", _ROLES)):
            (partial.path / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
        OPTTokenizer.from_directory(partial.path)  # raises if the tokenizer cannot be read back
        if output.exists():
            _move_files(partial.path, output)
        else:
            partial.publish()


def _move_files(source: Path, output: Path) -> None:
    """Replace the tokenizer in a directory that holds other files, too."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (source / name).replace(output / name)
        else:  # a former tokenizer.json would be read instead of the new files
            (output / name).unlink(missing_ok=True)
