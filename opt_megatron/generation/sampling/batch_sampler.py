"""Sampling for all rows of a batch at once, where their logits are.

The token is the one that `sampler.choose_token` chooses from the same logits by the same random number: the filters
keep the same tokens, in particular those that tie. What differs is how: `logits_processors.py` looks at one row and
leaves out what it does not need, which is fast on a CPU; here all rows are sorted, and no decision depends on a value,
so that a GPU need not wait for the host, and a CUDA graph can record it.

B = rows, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .green_lists import green_bits, left_hash_seed
from .logits_processors import COLD, HUGE, TINY, ProcessorChain
from .random_numbers import Purpose, uniform
from .watermark_options import LEFT_HASH

_BELOW_ONE = 1 - 2**-24  # the largest number below 1 in float32
NO_TOKEN = -1  # in place of an id where no token is possible


class SamplingRow(NamedTuple):
    """How a sequence's next token is chosen.

    Attributes:
        temperature: 0 takes the best token; the other options are not looked at then.
        top_k: 0 for all; top_p: 1 for all; min_p: 0 for all.
        seed, choice: of the random numbers (`random_numbers.uniform`).
        delta: of the watermark, 0 for none; gamma, key: of its green lists; num_listed: their ids, 0 for all.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    choice: int
    delta: float = 0.0
    gamma: float = 0.0
    key: int = 0
    num_listed: int = 0


GREEDY = SamplingRow(0.0, 0, 1.0, 0.0, 0, 0)


class SamplingTensors(NamedTuple):
    """What `sample_rows` needs of rows, [B] each.

    Attributes:
        temperature: float32, above 0.
        shift_above: float32; where the best score's magnitude is above it, the best is subtracted from all scores.
        cut: int64, how many of the lowest scores top-k leaves out, but for ties.
        droppable: float32, the share of the probability that top-p may leave out; below 0 for none, and below 1, so
            that the best token stays also for a p so small that 1 - p is 1.
        min_p: float32.
        seed, choice: int64.
        is_sampled: float64, 1; 0 in a greedy row.
        delta: float32, added to the logits of green ids.
    """

    temperature: Tensor
    shift_above: Tensor
    cut: Tensor
    droppable: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    is_sampled: Tensor
    delta: Tensor

    @classmethod
    def of(cls, fields: Tensor, vocab_size: int) -> SamplingTensors:
        """From [10, B] int64: the fields of SamplingRows, those that are float64 by their bits."""
        seed, choice, top_k = fields[4], fields[5], fields[1]
        temperature, top_p, min_p, delta = (fields[index].contiguous().view(torch.float64) for index in (0, 2, 3, 6))
        return cls(
            temperature.clamp(min=TINY).float(),
            torch.where(temperature < COLD, -1.0, HUGE).float(),
            vocab_size - torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size),
            torch.where(top_p < 1, 1 - top_p, -1.0).float().clamp(max=_BELOW_ONE),
            min_p.float(),
            seed,
            choice,
            (temperature > 0).double(),
            delta.float(),
        )

    def first(self, count: int) -> SamplingTensors:
        """Of the first rows, in the same memory."""
        return SamplingTensors(*(values[:count] for values in self))

    def numbers(self, positions: Tensor) -> Tensor:
        """The random numbers of tokens at positions [B] or [B, any] of the rows' sequences; 0 in greedy rows."""
        seed, choice, is_sampled = (
            values.view(-1, *[1] * (positions.dim() - 1)) for values in (self.seed, self.choice, self.is_sampled)
        )
        return uniform(seed, choice, positions, Purpose.TOKEN) * is_sampled


def row_of(chain: ProcessorChain, seed: int, choice: int) -> SamplingRow | None:
    """The row of a request's options; None if they need a processor that only the host has."""
    params = chain.params
    if chain.is_plain_greedy:
        return GREEDY
    if not all(processor.is_batched for processor in (*chain.processors, *chain.sampling_processors)):
        return None
    if params.lambda_decay < 1:  # top-p then depends on the tokens so far
        return None
    row = GREEDY
    if not chain.is_greedy:
        row = SamplingRow(params.temperature, params.top_k, params.top_p, params.min_p, seed, choice)
    if params.mark == 0:
        return row
    if params.watermark_scheme != LEFT_HASH or params.watermark_context_width > 1:
        return None  # the list depends on more than the newest token
    return row._replace(
        delta=params.mark,
        gamma=params.watermark_gamma,
        key=params.watermark_key,
        num_listed=params.watermark_vocab_size or 0,
    )


def green_bits_of_rows(rows: Sequence[SamplingRow], newest: Sequence[int], vocab_size: int) -> Tensor | None:
    """The green lists of rows, for `sample_rows`; None where no row has a watermark. They are made on the host.

    Args:
        newest: the token before the one that is chosen, of each row; that of a row without a watermark is not used.
        vocab_size: V.

    Returns:
        [B, ceil(V / 8)] uint8, a bit for each id, the lowest first.
    """
    if not any(row.delta for row in rows):
        return None
    packed = np.zeros((len(rows), -(-vocab_size // 8)), dtype=np.uint8)
    for index, (row, token) in enumerate(zip(rows, newest, strict=True)):
        if row.delta:
            assert token >= 0, "the leader has not read the newest token"
            listed = row.num_listed or vocab_size
            bits = green_bits(left_hash_seed(row.key, token), listed, int(listed * row.gamma))
            packed[index, : len(bits)] = bits
    return torch.from_numpy(packed)


def argmax_rows(logits: Tensor, suppressed: Tensor) -> Tensor:
    """The first of the best ids, [B] int64, of logits [B, V] without suppressed ids."""
    return _suppress(logits, suppressed).argmax(-1)


def sample_rows(
    logits: Tensor, rows: SamplingTensors, numbers: Tensor, suppressed: Tensor, green: Tensor | None = None
) -> Tensor:
    """The next token of every row.

    A greedy row is one at the lowest temperature, where only the best tokens have a weight, with the number 0, which
    takes the first of them.

    Args:
        logits: [B, V] float32.
        numbers: [B] float64, from 0 up to but not including 1 (`SamplingTensors.numbers`).
        suppressed: [ids] int64 that are never chosen.
        green: the rows' green lists (`green_bits_of_rows`), where there is a watermark.

    Returns:
        [B] int64; NO_TOKEN where a row has no possible token.
    """
    if green is not None:
        logits = _prefer_green(logits, green, rows.delta)
    logits = _suppress(logits, suppressed)
    best = logits.amax(-1, keepdim=True)
    reached = _weights(_tempered(logits, best, rows), rows).cumsum(-1, dtype=torch.float64)
    # Below the total also when it is rounded: a number is at most 1 - 2^-53.
    is_before = reached <= numbers[:, None] * reached[:, -1:]
    return torch.where(best[:, 0] > -math.inf, is_before.sum(-1), NO_TOKEN)  # NaN is not above it either


def _prefer_green(logits: Tensor, green: Tensor, delta: Tensor) -> Tensor:
    """`green_lists.prefer_green` of every row."""
    places = torch.arange(8, dtype=torch.uint8, device=green.device)
    is_green = (green[:, :, None] >> places & 1).flatten(1)[:, : logits.size(1)].bool()
    return torch.where(is_green, logits + delta[:, None], logits)


def _suppress(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.index_fill(-1, ids, -math.inf) if len(ids) else logits


def _tempered(logits: Tensor, best: Tensor, rows: SamplingTensors) -> Tensor:
    """`logits_processors.apply_temperature` of every row."""
    scores = logits - best.masked_fill(best.abs() <= rows.shift_above[:, None], 0.0)
    # inf - inf: infinite scores are equally likely, and all others impossible.
    return scores.nan_to_num_(0.0, math.inf, -math.inf) / rows.temperature[:, None]


def _weights(scores: Tensor, rows: SamplingTensors) -> Tensor:
    """What the probabilities [B, V] are in proportion to: 0 where top-k, top-p or min-p drop a token.

    Not normalised: a division would round, and the sum of what it divides by depends on the order of summation.
    """
    # Ascending, equal ones in the order of their ids: top-p drops from the beginning on.
    ordered, ids = scores.sort(dim=-1, stable=True)
    is_cut = ordered < ordered.gather(1, rows.cut[:, None])
    weights = (ordered - ordered[:, -1:]).exp_().masked_fill_(is_cut, 0.0)
    reached = weights.cumsum(-1, dtype=torch.float64)
    is_dropped = (reached / reached[:, -1:]).float() <= rows.droppable[:, None]
    is_dropped |= weights < rows.min_p[:, None]
    return torch.empty_like(scores).scatter_(1, ids, weights.masked_fill_(is_dropped, 0.0))
