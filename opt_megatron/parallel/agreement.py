"""What must be the same on all ranks is compared before anything is computed: a rank that sees other files, or has
other options, would otherwise contribute to wrong results without any error."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from ..errors import UserError

_LONGEST_VALUE = 80  # characters of a value in a message


def check_same_on_all_ranks(group: dist.ProcessGroup, facts: Mapping[str, object], source: str = "") -> None:
    """Compare facts, which are picklable, with one gather; called on all ranks.

    Args:
        group: all ranks, over gloo.
        source: where this rank has them from, for the message. It may differ.

    Raises:
        UserError: on every rank; it names the first rank that differs from rank 0, and a difference.
    """
    named = {f"rank {dist.get_rank(group)}" + (f" ({source})" if source else ""): dict(facts)}
    gathered = [named] * dist.get_world_size(group)
    dist.all_gather_object(gathered, named, group=group)
    difference = first_difference({name: facts for one in gathered for name, facts in one.items()})
    if difference is not None:
        raise UserError(f"{difference}: start all ranks with the same model, data and options")


def first_difference(facts: Mapping[str, Mapping[str, object]]) -> str | None:
    """In what the facts of a rank differ from those of the first one, in words; None if all are the same.

    Args:
        facts: name of the rank -> name of the fact -> value.
    """
    first, ours = next(iter(facts.items()))
    for rank, theirs in facts.items():
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if different:
            name, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
            return f"{rank} has {name} {_shown(theirs.get(name))}, {first} {_shown(ours.get(name))}{more}"
    return None


def _shown(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
