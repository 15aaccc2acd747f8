"""One rank asks, all compute: what a program that runs on the leader alone (lm-eval) needs of a model on several ranks.

    evaluator = Evaluator(pretrained, model)
    result = evaluator.lead(lambda: ...)        # on every rank; the action runs on the leader and asks

Between its questions the other ranks wait for the next one. A question is checked on the leader before it is
sent, so that all ranks carry it out or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import UserError
from ..generation.core.engine import Engine
from ..generation.request import Completion, Request
from ..model.opt_model import OPTModel
from ..model.scoring import Item, Score, check_items, score
from ..parallel.context import on_all_ranks
from ..pretrained import Pretrained

T = TypeVar("T")
_SCORE, _COMPLETE, _STOP = "score", "complete", "stop"


class Evaluator:
    """Scores and generates on all ranks when the leader asks.

    The engine, which takes the model over, is made when something is to be generated; scoring goes on as before.

    Args:
        batch_size: sequences in a pass, and that generate at a time.
    """

    def __init__(self, pretrained: Pretrained, model: OPTModel, *, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but must be at least 1")
        self.pretrained = pretrained
        self.batch_size = batch_size
        self._parallel = pretrained.parallel
        self._model = model
        self._engine: Engine | None = None

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
        check_items(items, self.pretrained.config)
        self._parallel.broadcast_object((_SCORE, list(items)))
        return self._score(items, on_batch)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """`Engine.complete`; on the leader, within `lead`.

        Raises:
            UserError: a request cannot be run.
        """
        self._parallel.broadcast_object((_COMPLETE, None))
        return self._complete(requests)

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
                self._score(content, None)
                continue
            try:
                self._complete([])
            except UserError:  # the leader's; it decides what becomes of it
                continue

    def _score(self, items: Sequence[Item], on_batch: Callable[[int], object] | None) -> list[Score]:
        return score(
            self._model,
            self._parallel,
            items,
            batch_size=self.batch_size,
            num_tokens=self.pretrained.num_tokens,
            on_batch=on_batch,
        )

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        if self._engine is None:
            self._engine = Engine(
                self._model,
                self._parallel,
                max_batch_size=self.batch_size,
                num_tokens=self.pretrained.num_tokens,
            )
        return self._engine.complete(requests)
