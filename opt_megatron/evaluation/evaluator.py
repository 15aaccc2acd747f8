"""A model on several ranks for a program that runs on the leader alone (lm-eval).

    evaluator = Evaluator(opt)
    result = evaluator.lead(lambda: ...)        # on every rank; the action runs on the leader and asks

Between its questions the other ranks wait for the next one. A question is checked on the leader before it is
sent, so that all ranks carry it out or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..api import OPT
from ..errors import UserError
from ..generation.request import Completion, Request
from ..model.scoring import Item, Score, check_items
from ..parallel.context import on_all_ranks

T = TypeVar("T")
_SCORE, _COMPLETE, _STOP = "score", "complete", "stop"


class Evaluator:
    """Scores and generates on all ranks when the leader asks.

    The engine, which repacks the weights, is made when something is to be generated; scoring goes on as before.
    """

    def __init__(self, opt: OPT) -> None:
        self.opt = opt
        self._parallel = opt.parallel

    def lead(self, action: Callable[[], T]) -> T | None:
        """Run the action on the leader, who alone gets its result, while the others carry out what it asks.

        Raises:
            UserError: the action's; on every rank.
        """
        return on_all_ranks(self._parallel, lambda: self._lead(action) if self._parallel.is_leader else self._follow())

    def score(self, items: Sequence[Item], on_batch: Callable[[int], object] | None = None) -> list[Score]:
        """`scoring.score`; on the leader, within `lead`.

        Raises:
            UserError: an item does not fit the model.
        """
        check_items(items, self.opt.config)
        self._parallel.broadcast_object((_SCORE, list(items)))
        return self.opt.score_items(items, on_batch=on_batch)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`Engine.complete`; on the leader, within `lead`.

        Raises:
            UserError: a request cannot be run.
        """
        self._parallel.broadcast_object((_COMPLETE, None))
        return self.opt.engine.complete(requests)

    def _lead(self, action: Callable[[], T]) -> T:
        try:
            return action()
        finally:
            self._parallel.broadcast_object((_STOP, None))

    def _follow(self) -> None:
        while True:
            question, content = self._parallel.broadcast_object(None)
            if question == _STOP:
                return
            if question == _SCORE:
                self.opt.score_items(content)
                continue
            try:
                self.opt.engine.complete([])
            except UserError:  # the leader's; it decides what becomes of it
                continue
