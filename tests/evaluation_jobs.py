"""What tests of evaluation let every rank do (importable by the rank processes)."""

from __future__ import annotations

from pathlib import Path

from opt_megatron.checkpoint.load import load_model
from opt_megatron.evaluation.perplexity import Documents, Perplexity, perplexity
from opt_megatron.evaluation.scoring import Item, Score, score
from opt_megatron.generation.engine import Engine
from opt_megatron.parallel import init_parallel


def perplexities(directory: Path, tp: int, pp: int, documents: Documents, options: list[dict]) -> list[Perplexity]:
    """With each of the options."""
    parallel = init_parallel(tp, pp)
    model = load_model(directory, None, parallel)
    return [perplexity(model, parallel, documents, **some) for some in options]


def scores(
    directory: Path, tp: int, pp: int, items: list[Item], batch_size: int, prepared: bool = False
) -> list[Score]:
    """Of an ordinary model, or of one that an engine has taken over."""
    parallel = init_parallel(tp, pp)
    model = load_model(directory, None, parallel)
    if prepared:
        Engine(model, parallel)
    return score(model, parallel, items, batch_size=batch_size)
