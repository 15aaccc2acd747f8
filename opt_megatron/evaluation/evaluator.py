"""A model on several ranks for a program that runs on the leader alone (lm-eval).

    evaluator = Evaluator(opt)
    result = evaluator.lead(lambda: ...)        # on every rank; the action runs on the leader

The other ranks wait for the leader's commands. A command is checked on the leader before it is sent, so that either
all ranks execute it or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import TypeVar

from ..api import OPT
from ..errors import UserError
from ..generation.request import Completion, Request
from ..model.scoring import Item, Score, check_items
from ..parallel.command_loop import CommandLoop
from ..parallel.context import on_all_ranks

T = TypeVar("T")


class _Command(IntEnum):
    SCORE = 0
    COMPLETE = 1


class Evaluator:
    """Scores and generates on all ranks, called by the leader alone.

    The engine, which repacks the weights, is created by the first call of `complete`; scoring works before and after.
    """

    def __init__(self, opt: OPT) -> None:
        self.opt = opt
        self._parallel = opt.parallel
        self._commands = CommandLoop(self._parallel, self._execute)

    def lead(self, action: Callable[[], T]) -> T | None:
        """Run the action on the leader, which alone gets its result; the other ranks execute its calls.

        Raises:
            UserError: the action's; on every rank.
        """
        return on_all_ranks(self._parallel, lambda: self._lead_or_follow(action))

    def score(self, items: Sequence[Item], on_batch: Callable[[int], object] | None = None) -> list[Score]:
        """`scoring.score`; on the leader, within `lead`.

        Raises:
            UserError: an item does not fit the model.
        """
        check_items(items, self.opt.config)
        self._commands.send(_Command.SCORE)
        return self._score(items, on_batch)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`Engine.complete`; on the leader, within `lead`.

        Raises:
            UserError: a request cannot be run.
        """
        self._commands.send(_Command.COMPLETE)
        return self.opt.engine.complete(requests)

    def _lead_or_follow(self, action: Callable[[], T]) -> T | None:
        if self._parallel.is_leader:
            with self._commands.leading():
                return action()
        self._commands.follow()
        return None

    def _execute(self, command: int, numbers: list[int]) -> None:
        """On a follower: its part of `score` or `complete`."""
        if command == _Command.SCORE:
            self._score([], None)
            return
        with suppress(UserError):  # the leader raises the same error, and handles it
            self.opt.engine.complete([])

    def _score(self, items: Sequence[Item], on_batch: Callable[[int], object] | None) -> list[Score]:
        return self.opt.score_items(self._parallel.broadcast_object(list(items)), on_batch=on_batch)
