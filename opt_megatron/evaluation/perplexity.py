"""Perplexity of texts, and the same in nats per token and bits per byte.

Texts become documents: `text.rstrip()` and the end-of-sequence token, as in OPT's pre-training (metaseq's
`StreamingTokenBlock`). They are concatenated (the default, as for the training loss) or scored one by
one. The tokens are cut into windows. Every window begins with BOS and feeds the model N tokens (by default all its
positions), and every token is scored once.

    consecutive (stride = N)      sliding (stride S < N)
    BOS t1 .. tN-1  scores t1 .. tN           BOS t1 .. tN-1           scores t1 .. tN
    BOS tN+1 ..     scores tN+1 .. t2N        BOS tS+1 .. tS+N-1       scores tN+1 .. tN+S

So every scored token, except in the first window, has at least N - S tokens before it (BOS included).
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
from ..training.metrics import perplexity_of

_BATCHES_AT_A_TIME = 64  # windows are sorted by length within this many batches


@dataclass(frozen=True)
class Documents:
    """Tokenized texts.

    Attributes:
        tokens: ids of each document, with the end-of-sequence token unless it was left out.
        num_bytes: of the stripped texts in UTF-8, without end-of-sequence tokens.
    """

    tokens: tuple[tuple[int, ...], ...]
    num_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of documents, and how it was computed.

    Attributes:
        nats_per_token: mean negative natural log-likelihood.
        bits_per_byte: the sum in bits, divided by the texts' bytes; comparable between tokenizers.
        perplexity: exp(nats_per_token); infinity where that is too large for a float.
        tokens: number of scored tokens, end-of-sequence tokens included.
        bytes: of the texts in UTF-8.
        context: N, positions of a window.
        stride: S, new tokens of a window.
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
        """The fields by name, for JSON."""
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
    """The windows of one stream of tokens (see the module's description).

    Args:
        context: N, positions of a window.
        stride: S, from 1 to N.
    """
    scored = begin = 0
    while scored < len(tokens):
        end = min(begin + context, len(tokens))
        yield Item((bos, *tokens[begin:scored]), tuple(tokens[scored:end]))
        scored, begin = end, begin + stride


def num_windows(length: int, context: int, stride: int) -> int:
    """Number of windows of a stream of `length` tokens."""
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
    """Score documents; called on every rank with the same documents, and every rank gets the result.

    Layouts and batch sizes change only rounding. Windows are made some batches at a time: with a stride of 1, all
    of them together would hold every token as often as the context has positions.

    Args:
        context: positions of a window; by default all of the model's.
        stride: new tokens of a window; by default `context`, for consecutive windows.
        concatenate: score all documents as one stream; otherwise each document begins a new window.
        batch_size: windows in a pass; by default the model's `batch_size`.
        on_windows: called with the number of windows of each finished batch, and with that of all windows.

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
        perplexity=perplexity_of(nats / count),
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
