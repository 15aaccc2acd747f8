"""What callers of `OPT` pass (texts, ids, numbers of layers), checked and converted to one form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .config import OPTConfig
from .errors import UserError
from .model.scoring import Item
from .tokenizer import OPTTokenizer

Tokens = Tensor | Sequence[int] | Sequence[Sequence[int]]


def token_ids(tokens: Tokens, config: OPTConfig) -> Tensor:
    """Ids as int64 [b, s], on the CPU.

    Raises:
        UserError: they are not whole numbers, not of one length, more than the model's positions, or not in its
            vocabulary.
    """
    try:
        if isinstance(tokens, list | tuple):  # its rows may be tensors or arrays
            tokens = [_to_python(row) for row in tokens]
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"tokens must be ids, in sequences of one length: {error}") from None
    ids = ids[None] if ids.dim() == 1 else ids
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 2 or ids.numel() == 0 or not is_whole:
        raise UserError(f"tokens must be ids [b, s] or [s], not {ids.dtype} {list(ids.shape)}")
    ids = ids.long()  # first: torch does not compare unsigned numbers of 16 bits or more
    if ids.size(1) > config.max_position_embeddings:
        raise UserError(f"{ids.size(1)} tokens are more than the model's {config.max_position_embeddings}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise UserError(f"ids go from 0 to {config.vocab_size - 1}, not {int(ids.min())} to {int(ids.max())}")
    return ids


def layer_numbers(layers: Iterable[int] | None, count: int) -> list[int]:
    """Numbers from 0 to count - 1; None means all of them, negative ones count from the end.

    Raises:
        UserError: something is not such a number.
    """
    if layers is None:
        return list(range(count))
    if not isinstance(layers, Iterable):
        raise UserError(f"layers must be numbers in a list, as in layers=[{layers}]")
    numbers = list(_to_python(layers))
    for number in numbers:
        if not isinstance(number, Integral) or not -count <= int(number) < count:
            raise UserError(f"layer {number!r}: there are {count}, from 0 to {count - 1}")
    return [int(number) % count for number in numbers]


def prompt_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """The ids of a prompt that is not text.

    Raises:
        UserError: it is not a list of whole numbers.
    """
    ids = _to_python(prompt)
    if not isinstance(ids, Sequence) or not all(isinstance(token, Integral) for token in ids):
        raise UserError(f"a prompt must be a text or a list of ids, not {repr(prompt)[:80]}")
    return tuple(ids)


def scored_pair(text: str | tuple[str, str]) -> tuple[str, str]:
    """Context and continuation; a text alone is the continuation of nothing.

    Raises:
        UserError: it is neither a text nor a pair of texts.
    """
    pair = ("", text) if isinstance(text, str) else text
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise UserError(f"what is scored must be a text or a pair (context, continuation), not {repr(text)[:80]}")
    return pair[0], pair[1]


def pair_to_item(context: str, continuation: str, tokenizer: OPTTokenizer) -> Item:
    """The ids of a pair: a space between the two belongs to the continuation."""
    before = tokenizer.encode(context.rstrip(" "))
    both = tokenizer.encode(context + continuation)
    return Item(tuple(before), tuple(both[len(before) :]))


def _to_python(value: Any) -> Any:
    """Tensors and numpy's arrays and numbers as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value
