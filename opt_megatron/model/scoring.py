"""Log-likelihoods of continuations on any layout, in batches of items that are about as long.

Whole sequences go through the model's ordinary forward pass, also after an engine has prepared the model.
Logits are computed for the scored tokens only, some rows at a time, and stay divided over the tensor
parallel ranks, which exchange four numbers a token.

R = scored tokens of a batch, V = vocabulary rows of this tensor parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import OPTConfig
from ..errors import UserError
from ..parallel.collectives import Collectives, tensor_parallel_collectives
from ..parallel.context import ParallelContext
from .full_forward import local_logits, packed_stage_forward, stage_forward
from .incremental_forward import IncrementalForward
from .opt_model import OPTModel

_MOST_LOGITS = 2**25  # numbers at a time: 128 MiB in float32
_ROWS_IN_CACHE = 8  # of OPT's vocabulary: 1.6 MB


@dataclass(frozen=True)
class Item:
    """A continuation to score.

    Attributes:
        context: ids before it, BOS included; at least one.
        continuation: ids whose log-likelihood is wanted; at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def input_tokens(self) -> tuple[int, ...]:
        """The ids that the model reads: all but the last one, after which nothing is predicted."""
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Score:
    """The model's log-likelihood of a continuation.

    Attributes:
        logprobs: natural log-probability of each of its tokens.
        is_greedy: each of them is the likeliest one (the lowest id among equally likely ones).
    """

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Natural log-likelihood of the whole continuation."""
        return math.fsum(self.logprobs)


def check_batch_size(batch_size: int) -> None:
    """Raise UserError if there are no sequences in a pass."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1")


def check_items(items: Sequence[Item], config: OPTConfig) -> None:
    """Raise UserError, which counts the items from 1, unless the model can score them all."""
    for number, item in enumerate(items, 1):
        _check_item(item, config, f"text {number}")


def _check_item(item: Item, config: OPTConfig, what: str) -> None:
    if not item.context or not item.continuation:
        raise UserError(f"{what}: context and continuation must have a token each, BOS being the least context")
    config.check_token_ids(item.context + item.continuation, what)
    positions = config.max_position_embeddings
    if len(item.input_tokens) > positions:
        raise UserError(
            f"{what} has {len(item.input_tokens) + 1} tokens with BOS, and a model with {positions} positions scores "
            f"{positions + 1} at the most: shorten it"
        )


def score(
    model: OPTModel,
    parallel: ParallelContext,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], object] | None = None,
) -> list[Score]:
    """Score items; called on every rank with the same ones, and gives every rank the same result.

    The longest come first, so that a batch that does not fit into memory fails at once. Items with the same input
    (one-token answers to a question) share one pass over it.

    Args:
        batch_size: sequences in a pass; it changes nothing but rounding.
        on_batch: called with the number of items of each finished batch.

    Raises:
        UserError: an item does not fit the model, or `batch_size` is below 1.
    """
    check_batch_size(batch_size)
    check_items(items, model.opt_config)
    order = _longest_first(items)
    ordered = [items[index] for index in order]
    results = _score_ordered(model, parallel, ordered, batch_size, on_batch)
    return _in_order(order, _scores(ordered, _from_last_stage(parallel, results, ordered)))


def score_own_items(
    model: OPTModel, parallel: ParallelContext, items: Sequence[Item], *, batch_size: int
) -> list[Score]:
    """Score items that are the same on the ranks of one data parallel replica alone, and are checked already.

    Returns:
        On the replica's last stage a score for each item; an empty list on the other stages.
    """
    order = _longest_first(items)
    ordered = [items[index] for index in order]
    results = _score_ordered(model, parallel, ordered, batch_size)
    return _in_order(order, _scores(ordered, torch.cat(results))) if results and parallel.is_last_stage else []


def _longest_first(items: Sequence[Item]) -> list[int]:
    """The numbers of the items, so that those with the same input follow one another."""
    return sorted(range(len(items)), key=lambda index: (-len(items[index].input_tokens), items[index].input_tokens))


def _in_order(order: Sequence[int], scores: Sequence[Score]) -> list[Score]:
    return [one for _, one in sorted(zip(order, scores, strict=True), key=lambda pair: pair[0])]


def _score_ordered(
    model: OPTModel,
    parallel: ParallelContext,
    ordered: Sequence[Item],
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """The results of all batches (`_score_batch`)."""
    sequences = [list(alike) for _, alike in groupby(ordered, key=lambda item: item.input_tokens)]
    collectives = tensor_parallel_collectives(parallel)
    forward = _stage_forward(model, parallel)
    results: list[Tensor] = []
    for begin in range(0, len(sequences), batch_size):
        batch = sequences[begin : begin + batch_size]
        results.append(_score_batch(model, parallel, collectives, batch, forward))
        if on_batch:
            on_batch(sum(map(len, batch)))
    return results


def _stage_forward(model: OPTModel, parallel: ParallelContext) -> Callable[[Tensor], Tensor]:
    """From ids [b, s] to the hidden states [s, b, H] of this rank's stage; hooks need the modules' own forward pass."""
    if model.is_packed and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return partial(packed_stage_forward, IncrementalForward(model, parallel), parallel)
    return partial(stage_forward, model, parallel)


@torch.inference_mode()
def _score_batch(
    model: OPTModel,
    parallel: ParallelContext,
    collectives: Collectives,
    batch: Sequence[list[Item]],
    forward: Callable[[Tensor], Tensor],
) -> Tensor:
    """[R, 2]: log-probability and whether it is the likeliest token; empty except on the last stage.

    Args:
        batch: for each sequence the items whose input it is; the longest sequence first.
        forward: of `_stage_forward`.
    """
    inputs = [alike[0].input_tokens for alike in batch]
    padding = model.opt_config.pad_token_id  # has no effect: the scored positions are to its left
    tokens = torch.tensor([ids + (padding,) * (len(inputs[0]) - len(ids)) for ids in inputs])
    hidden = forward(tokens.to(parallel.device))
    if not parallel.is_last_stage:
        return torch.empty(0, 2)
    items = [(row, item) for row, alike in enumerate(batch) for item in alike]
    scored = [hidden[len(item.context) - 1 : len(inputs[row]), row] for row, item in items]
    targets = torch.tensor([token for _, item in items for token in item.continuation], device=parallel.device)
    rows = torch.cat(scored)
    ranks = parallel.tensor_model_parallel_size
    vocab_rows = model.opt_config.padded_vocab_size(ranks) // ranks
    first, size = parallel.tensor_model_parallel_rank * vocab_rows, max(1, _MOST_LOGITS // vocab_rows)
    parts = [
        _log_probabilities(local_logits(model, some), own, first, collectives)
        for some, own in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts).cpu()


def _log_probabilities(local: Tensor, targets: Tensor, first: int, collectives: Collectives) -> Tensor:
    """[R, 2] from logits [R, V], which are overwritten, and targets [R]; `first` is the id of the first column."""
    mine = (targets >= first) & (targets < first + local.size(1))
    column = (targets - first).where(mine, 0)[:, None]
    own = local.gather(1, column)[:, 0].masked_fill(~mine, -torch.inf)
    # Some rows at a time, so that they stay in the processor's cache from one pass to the next.
    sums, best, index = map(torch.cat, zip(*map(_reduced, local.split(_ROWS_IN_CACHE)), strict=True))
    every = collectives.all_gather(torch.stack((sums, own, best, (index + first).float()), dim=-1))
    sums, owns, bests, ids = every.unflatten(-1, (-1, 4)).unbind(-1)  # each [R, ranks]
    winner = bests.argmax(-1, keepdim=True)  # the first, hence the lowest ids, of equal ones
    is_best = ids.gather(1, winner)[:, 0] == targets
    return torch.stack((owns.amax(-1) - sums.logsumexp(-1), is_best.float()), dim=-1)


def _reduced(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the sum of exponentials of each row, its largest number, and that one's index: each [rows]."""
    best, index = logits.max(-1)
    return logits.sub_(best[:, None]).exp_().sum(-1).log_().add_(best), best, index


def _from_last_stage(parallel: ParallelContext, results: list[Tensor], items: Sequence[Item]) -> Tensor:
    """The rows of all batches, on every rank."""
    rows = torch.cat(results) if results else torch.empty(0, 2)
    if parallel.pipeline_model_parallel_size == 1:
        return rows
    if not parallel.is_last_stage:
        rows = torch.empty(sum(len(item.continuation) for item in items), 2)
    dist.broadcast(rows, src=parallel.logits_rank, group=parallel.control_group)
    return rows


def _scores(items: Sequence[Item], rows: Tensor) -> list[Score]:
    parts = rows.split([len(item.continuation) for item in items]) if items else ()
    return [Score(tuple(part[:, 0].tolist()), bool(part[:, 1].all())) for part in parts]
