"""Jobs that ranks run for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opt_megatron.api import OPT
from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.evaluation.evaluator import Evaluator
from opt_megatron.evaluation.perplexity import Documents, Perplexity, perplexity
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.model.scoring import Item, Score, score
from opt_megatron.parallel.context import init_parallel


def perplexities(directory: Path, tp: int, pp: int, documents: Documents, options: list[dict]) -> list[Perplexity]:
    """With each of the options."""
    opt = OPT.open(str(directory), init_parallel(tp, pp))
    return [perplexity(opt, documents, **some) for some in options]


def scores(
    directory: Path, tp: int, pp: int, items: list[Item], batch_size: int, prepared: bool = False
) -> list[Score]:
    """Of an ordinary model, or of one that an engine has taken over."""
    parallel = init_parallel(tp, pp)
    model = load_model(directory, None, parallel)
    if prepared:
        Engine(model, parallel)
    return score(model, parallel, items, batch_size=batch_size)


def questions(directory: Path, tp: int, pp: int) -> list | None:
    """What the leader hears when it scores, generates, asks nonsense, and scores again; None on the other ranks."""
    evaluator = _evaluator(directory, tp, pp)
    items = [Item((2, 9), (30, 31)), Item((2,), (7,)), Item((2, 9), (30, 40))]

    def action() -> list:
        heard: list = [evaluator.score(items)]
        params = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
        heard.append([one.tokens for one in evaluator.complete([Request((2, 9, 30), params)])])
        for nonsense in (
            lambda: evaluator.score([Item((2,), (100_000,))]),
            lambda: evaluator.complete([Request((2,) * 300, params)]),
        ):
            try:
                nonsense()
            except UserError as error:
                heard.append(str(error))
        return [*heard, evaluator.score(items)]

    return evaluator.lead(action)


def error_of_the_action(directory: Path, tp: int) -> str:
    """The message that a rank gets when the leader's action fails."""
    evaluator = _evaluator(directory, tp, 1)

    def action() -> None:
        evaluator.score([Item((2,), (5,))])
        raise UserError("no such task")

    try:
        evaluator.lead(action)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def lm_eval_answers(directory: Path, tp: int, pp: int, questions: list[tuple[str, tuple]]) -> dict[str, list] | None:
    """The adapter's answers to (kind of request, its arguments); None but on the leader."""
    evaluator = _evaluator(directory, tp, pp)

    def action() -> dict[str, list]:
        from opt_megatron.evaluation.lm_eval_model import OPTMegatronLM

        return ask(OPTMegatronLM.from_evaluator(evaluator), questions)

    return evaluator.lead(action)


def ask(lm: Any, questions: list[tuple[str, tuple]]) -> dict[str, list]:
    """The answers of one of lm-eval's models."""
    from lm_eval.api.instance import Instance

    requests: dict[str, list] = {}
    for number, (kind, arguments) in enumerate(questions):
        requests.setdefault(kind, []).append(Instance(kind, {}, arguments, number))
    return {kind: getattr(lm, kind)(of_kind, disable_tqdm=True) for kind, of_kind in requests.items()}


def _evaluator(directory: Path, tp: int, pp: int) -> Evaluator:
    return Evaluator(OPT.open(str(directory), init_parallel(tp, pp), batch_size=3))
