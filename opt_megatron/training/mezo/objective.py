"""What MeZO minimises, from the log-likelihoods of the answers of each example.

    nll              - sum of the log-probabilities of all tokens of tgt / their number
    classification   the cross-entropy of tgt among the candidates, each of which has the mean log-probability of its
                     tokens as its logit; the mean over the examples

The second is the authors' `train_as_classification` (arXiv:2305.17333, section 3 and appendix E).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...data.prompt_dataset import PromptExample
from ...model.opt_model import OPTModel
from ...model.scoring import Item, Score, score_own_items
from ...parallel.context import ParallelContext


@dataclass(frozen=True)
class ObjectiveSum:
    """Sums over the examples of all ranks; the same on every rank.

    Attributes:
        total: of the losses, in nats.
        count: by which it is divided: scored tokens, or for classification examples.
        correct: examples whose tgt has the largest logit.
        tokens: scored tokens.
    """

    total: float
    count: float
    correct: float
    tokens: float

    @property
    def loss(self) -> float:
        """The mean."""
        return self.total / self.count

    @property
    def accuracy(self) -> float:
        """Share of the examples that are classified correctly."""
        return self.correct / self.count


class Objective:
    """Computes the objective by forward passes without dropout, with logits for the answers' tokens alone.

    Args:
        kind: "nll" or "classification".
        batch_size: sequences in a pass.
    """

    def __init__(self, kind: str, model: OPTModel, parallel: ParallelContext, batch_size: int) -> None:
        self.is_classification = kind == "classification"
        self._model, self._parallel, self._batch_size = model, parallel, batch_size

    def __call__(self, examples: Sequence[PromptExample]) -> ObjectiveSum:
        """The objective of all ranks' examples; collective.

        Args:
            examples: of this rank's data parallel replica.
        """
        items = [Item(example.prompt, answer) for example in examples for answer in example.answers]
        scores = score_own_items(self._model, self._parallel, items, batch_size=self._batch_size)
        sums = torch.zeros(4, dtype=torch.float64)
        if scores and self._parallel.tensor_model_parallel_rank == 0:  # whom no other rank of the replica repeats
            sums = torch.tensor(self._sums(examples, scores), dtype=torch.float64)
        dist.all_reduce(sums, group=self._parallel.control_group)
        return ObjectiveSum(*sums.tolist())

    def _sums(self, examples: Sequence[PromptExample], scores: Sequence[Score]) -> list[float]:
        tokens = sum(len(one.logprobs) for one in scores)
        if not self.is_classification:
            return [-math.fsum(one.total for one in scores), tokens, 0, tokens]
        remaining = iter(scores)
        logits = [[_mean(next(remaining)) for _ in example.answers] for example in examples]
        losses = [_cross_entropy(own, example.label) for own, example in zip(logits, examples, strict=True)]
        correct = sum(own[example.label] == max(own) for own, example in zip(logits, examples, strict=True))
        return [math.fsum(losses), len(examples), correct, tokens]


def _mean(score: Score) -> float:
    return score.total / len(score.logprobs)


def _cross_entropy(logits: Sequence[float], label: int) -> float:
    largest = max(logits)
    return largest - logits[label] + math.log(math.fsum(math.exp(logit - largest) for logit in logits))
