"""Perplexity of texts: in nats a token, bits a byte, and as such.

Texts become documents: `text.rstrip()` and the end-of-sequence token, as in OPT's pre-training (metaseq's
`StreamingTokenBlock`). They are concatenated (the default, as the training loss has it), or each scored by
itself. The tokens are cut into windows; every window begins with BOS, feeds the model N = all its positions,
and every token is scored once.

    consecutive (stride = N)      sliding (stride S < N)
    BOS t1 .. tN-1  scores t1 .. tN           BOS t1 .. tN-1           scores t1 .. tN
    BOS tN+1 ..     scores tN+1 .. t2N        BOS tS+1 .. tS+N-1       scores tN+1 .. tN+S

So a token of a sliding window, but for those of the first, has at least N - S tokens before it (BOS included).
This is the scheme of transformers' documentation, "Perplexity of fixed-length models", with OPT's BOS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from ..api import OPT
from ..errors import UserError
from ..model.scoring import Item
from ..tokenizer import OPTTokenizer

_BATCHES_AT_A_TIME = 64  # among which windows are sorted by length


@dataclass(frozen=True)
class Documents:
    """Texts, tokenized.

    Attributes:
        tokens: ids of each document, the end of sequence included unless it was left out.
        num_bytes: of the texts in UTF-8, without what was stripped and without ends of sequences.
    """

    tokens: tuple[tuple[int, ...], ...]
    num_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """The result.

    Attributes:
        nats_per_token: mean negative natural log-likelihood.
        bits_per_byte: the sum in bits over the texts' bytes; comparable between tokenizers.
        perplexity: e to the nats a token; infinity where that is no number.
        tokens: how many were scored, ends of documents included.
        bytes: of the texts in UTF-8.
        context: positions that a window feeds.
        stride: tokens that a window adds.
    """

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    windows: int
    context: int
    stride: int
    is_concatenated: bool

    def to_dict(self) -> dict[str, float | int | bool]:
        """For JSON."""
        return asdict(self)


def tokenize(texts: Sequence[str], tokenizer: OPTTokenizer, *, add_eos: bool = True) -> Documents:
    """Documents of the texts that are not blank.

    Raises:
        UserError: none is left.
    """
    stripped = [text for text in (text.rstrip() for text in texts) if text]
    if not stripped:
        raise UserError("the data hold no text to score")
    end = (tokenizer.eos_token_id,) if add_eos else ()
    tokens = tuple((*ids, *end) for ids in tokenizer.encode_batch(stripped, add_bos=False))
    return Documents(tokens, sum(len(text.encode("utf-8")) for text in stripped))


def windows(tokens: Sequence[int], context: int, stride: int, bos: int) -> Iterator[Item]:
    """The windows of one stream of tokens (module docstring).

    Args:
        context: N, positions that a window may feed.
        stride: S, from 1 to N.
    """
    scored = begin = 0
    while scored < len(tokens):
        end = min(begin + context, len(tokens))
        yield Item((bos, *tokens[begin:scored]), tuple(tokens[scored:end]))
        scored, begin = end, begin + stride


def num_windows(length: int, context: int, stride: int) -> int:
    """How many windows a stream of `length` tokens is cut into."""
    return 0 if length == 0 else 1 + -(-max(0, length - context) // stride)


def perplexity(
    opt: OPT,
    documents: Documents,
    *,
    context: int | None = None,
    stride: int | None = None,
    concatenate: bool = True,
    batch_size: int | None = None,
    on_windows: Callable[[int, int], object] | None = None,
) -> Perplexity:
    """Score documents; called on every rank with the same ones, and the result is there on every rank.

    Layouts and batch sizes change rounding alone. Windows are made some batches at a time: with a stride of 1 all
    of them would hold every token as often as the context has positions.

    Args:
        context: positions of a window; by default all that the model has.
        stride: tokens that a window adds; by default `context`: consecutive windows.
        concatenate: one stream of all documents; else each begins a window of its own.
        batch_size: windows in a pass; by default the model's `batch_size`.
        on_windows: told how many windows a finished batch had, and how many there are.

    Raises:
        UserError: an option is out of its range.
    """
    context, stride = _check_window(opt.config.max_position_embeddings, context, stride)
    streams = [[token for ids in documents.tokens for token in ids]] if concatenate else documents.tokens
    bos = opt.config.bos_token_id
    made = (item for stream in streams for item in windows(stream, context, stride, bos))
    total = sum(num_windows(len(stream), context, stride) for stream in streams)
    on_batch = None if on_windows is None else lambda done: on_windows(done, total)
    batch_size = opt.batch_size if batch_size is None else batch_size
    totals: list[float] = []
    while items := list(islice(made, _BATCHES_AT_A_TIME * max(1, batch_size))):
        totals += [one.total for one in opt.score_items(items, batch_size=batch_size, on_batch=on_batch)]
    nats = -math.fsum(totals)
    count = sum(map(len, streams))
    return Perplexity(
        nats_per_token=nats / count,
        bits_per_byte=nats / math.log(2) / documents.num_bytes,
        perplexity=_exp(nats / count),
        tokens=count,
        bytes=documents.num_bytes,
        documents=len(documents.tokens),
        windows=total,
        context=context,
        stride=stride,
        is_concatenated=concatenate,
    )


def _check_window(positions: int, context: int | None, stride: int | None) -> tuple[int, int]:
    context = positions if context is None else context
    if not 1 <= context <= positions:
        raise UserError(f"the context is {context}, but must be from 1 to the model's {positions} positions")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"the stride is {stride}, but must be from 1 to the context of {context}")
    return context, stride


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
