"""opt-megatron detect: whether texts carry a watermark; needs a tokenizer, and no weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.jsonl import BadLine, BadLines, check_inputs, decode_text, get_string, parse_object, read_chunks
from ..errors import UserError, print_notice, printable
from ..generation.sampling.watermark_options import DetectionOptions
from ..options import Options, from_arguments, option
from .loading import TOY_NOTICE
from .option_groups import Groups, add_groups
from .prompts import parse_ids

if TYPE_CHECKING:
    from ..generation.sampling.watermark_detector import WatermarkDetection
    from ..tokenizer import OPTTokenizer

HELP = "say whether texts carry a watermark: z-scores and p-values, without the model's weights"
EXAMPLE = 'opt-megatron detect --load opt-1.3b --watermark-key 271828183 --text "A text of some 50 words ..."'


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Whose tokenizer is used, and the texts that are looked at."""

    load: str | None = option(
        None,
        help="the model that may have written the texts, as generate takes it: its tokenizer and its number of ids",
        metavar="CHECKPOINT",
        default_text="with --tokenizer none, else the embedded toy model, story",
        is_path=True,
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub repository")
    tokenizer: str | None = option(
        None,
        help="where the tokenizer's files are; without --load, --watermark-vocab-size says the number of ids",
        metavar="DIR",
        default_text="--load",
        is_path=True,
    )
    text: tuple[str, ...] | None = option(
        None, help="a text without its prompt; repeatable; default: standard input is one", metavar="TEXT"
    )
    tokens: tuple[str, ...] | None = option(None, help="token ids instead of a text; repeatable", metavar='"15 7 40"')
    input: tuple[str, ...] | None = option(
        None, help="JSON lines, one object a line; also .gz", nargs="+", metavar="FILE", is_path=True
    )
    json_key: str = option("text", help="the key of the text, or of a list of ids, in each object", metavar="KEY")
    strict: bool = option(False, help="stop at the first line that cannot be scored; default: skip and report them")
    json: bool = option(False, help="one JSON object a line for each text, nothing else")


OPTIONS: Groups = {"": (TextOptions,), "watermark": (DetectionOptions,)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Score all texts, then print the results.

    Raises:
        UserError: the options, the tokenizer or a text cannot be used.
    """
    given = [f"--{name}" for name in ("text", "tokens", "input") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given; use one of them")
    detector, bad = _Detector(args, from_arguments(DetectionOptions, args)), BadLines()
    if args.input is not None:
        results = list(_of_files(detector, args, bad))
    else:
        results = [(name, detector.detect(text, name)) for name, text in _texts(args)]
    for line in bad.report():
        print_notice(line)
    if not results:
        raise UserError("no text could be scored")
    for name, result in results:
        print(_as_json(name, result) if args.json else printable(_as_text(name, result)))


class _Detector:
    """Scores texts or ids, with the tokenizer and the number of ids that the arguments name."""

    def __init__(self, args: argparse.Namespace, options: DetectionOptions) -> None:
        from ..generation.sampling.watermark_detector import WatermarkDetector

        self._tokenizer, self._vocab_size = _open(args)
        self._detector = WatermarkDetector(options, self._vocab_size, self._tokenizer.bos_token_id)

    def detect(self, text: str | tuple[int, ...], what: str) -> WatermarkDetection:
        ids = self._tokenizer.encode(text, add_bos=False) if isinstance(text, str) else text
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise UserError(f"{what} holds the id {token}, but ids go from 0 to {self._vocab_size - 1}")
        return self._detector.detect(ids, what)


def _open(args: argparse.Namespace) -> tuple[OPTTokenizer, int]:
    """The tokenizer, and the number of ids of the model."""
    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.locate import EMBEDDED_NAME, locate
    from ..tokenizer import OPTTokenizer

    own = None if args.tokenizer is None else locate(args.tokenizer)
    if own is not None and args.load is None:
        if args.watermark_vocab_size is None:
            raise UserError("--tokenizer is given without --load: add --watermark-vocab-size, which is 50272 for OPT")
        tokenizer, vocab_size = OPTTokenizer.from_directory(own), args.watermark_vocab_size
        return tokenizer, max(vocab_size, len(tokenizer))
    if args.load is None:
        print_notice(TOY_NOTICE)
    checkpoint = open_checkpoint(locate(EMBEDDED_NAME if args.load is None else args.load, args.revision))
    tokenizer = OPTTokenizer.from_directory(own or checkpoint.path)
    tokenizer.check_fits(checkpoint.config.vocab_size)
    return tokenizer, checkpoint.config.vocab_size


def _texts(args: argparse.Namespace) -> Iterator[tuple[str, str | tuple[int, ...]]]:
    """The texts or ids of the command line, or of standard input, with names for messages."""
    for number, words in enumerate(args.tokens or (), 1):
        yield f"tokens {number}", parse_ids(words, f"--tokens {number}")
    for number, text in enumerate(args.text or (), 1):
        yield f"text {number}", _checked_text(text, f"--text {number}")
    if args.tokens is None and args.text is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("there is no text: give --text TEXT, --input FILE, or pipe one into standard input")
        try:
            yield "standard input", decode_text(sys.stdin.buffer.read())
        except ValueError as error:
            raise UserError(f"standard input: {error}") from None


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} is not UTF-8 text") from None
    return text


def _of_files(detector: _Detector, args: argparse.Namespace, bad: BadLines) -> Iterator[tuple[str, WatermarkDetection]]:
    """The result of each line, named by file and line; what cannot be scored is added to `bad`."""
    check_inputs(args.input)
    for chunk in read_chunks(args.input):
        for number, line in enumerate(chunk.lines, chunk.first_line):
            try:
                yield f"{chunk.path}:{number}", detector.detect(_text_of(line, args.json_key), "the text")
            except (ValueError, UserError) as error:
                bad.add([BadLine(chunk.path, number, str(error))], strict=args.strict)


def _text_of(line: bytes, key: str) -> str | tuple[int, ...]:
    """The text or the ids under the key.

    Raises:
        ValueError: there is neither.
    """
    value = parse_object(line)
    ids = value.get(key)
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return tuple(ids)
    return get_string(value, key)


def _as_text(name: str, result: WatermarkDetection) -> str:
    marked = "marked" if result.is_watermarked else "not marked"
    share = f"{result.num_green} of {result.num_scored} tokens green ({result.green_fraction:.1%})"
    return f"{name}: {marked}: {share}, z {result.z_score:.3f}, p {result.p_value:.3g}"


def _as_json(name: str, result: WatermarkDetection) -> str:
    shown: dict[str, Any] = {
        "source": name,
        "is_watermarked": result.is_watermarked,
        "num_scored": result.num_scored,
        "num_green": result.num_green,
        "green_fraction": result.green_fraction,
        "z_score": result.z_score,
        "p_value": result.p_value,
    }
    return json.dumps(shown, ensure_ascii=False)
