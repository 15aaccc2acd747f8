"""8-bit weights: their error, and sums that overflow half precision where inputs have outliers, as OPT's do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.generation.core.engine import Engine
from opt_megatron.model.linear_methods.registry import select_method
from opt_megatron.parallel.context import ParallelContext

from ...workload import make_prompts
from .. import models
from ..case import Case, Figures, attempt
from ..settings import Settings

_MOST_ERROR = 0.05  # relative, of logits and of one layer; 8 bits give 0.01
_OUTLIERS, _OUTLIER_SIZE = 8, 40.0


def cases(settings: Settings) -> Iterator[Case]:
    """Each dtype that 8-bit weights are multiplied with."""
    parallel = models.start(settings)
    for dtype in models.DTYPES:
        yield attempt(f"logits, {dtype}", partial(_logits, settings, parallel, dtype))
        yield attempt(f"outliers, {dtype}", partial(_outliers, settings, parallel, dtype))


def _logits(settings: Settings, parallel: ParallelContext, dtype: str) -> tuple[bool, Figures]:
    plain, quantized = (models.load(EMBEDDED_DIRECTORY, parallel, dtype, name) for name in (None, "int8"))
    prompts = make_prompts(plain.opt_config, 3, 40, seed=1)
    inputs = torch.tensor(prompts, device=settings.device)
    with torch.inference_mode():
        truth, logits = plain(inputs).float(), quantized(inputs).float()
    error = float((logits - truth).norm() / truth.norm())
    made = [models.complete(Engine(model, parallel), prompts, 12, temperature=0) for model in (plain, quantized)]
    same = sum(one == other for one, other in zip(*map(models.tokens_of, made), strict=True))
    return error < _MOST_ERROR, {"error": error, "rows with the same greedy tokens": same}


def _outliers(settings: Settings, parallel: ParallelContext, dtype: str) -> tuple[bool | None, Figures]:
    """One layer. The CPU's method rounds the inputs to 8 bits as well: nothing is claimed of it."""
    device, values = parallel.device, getattr(torch, dtype)
    method = select_method("int8", device, values)
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(512, 2048, generator=generator) * 0.006).to(device, values)
    inputs = torch.randn(4, 2048, generator=generator)
    inputs[:, :_OUTLIERS] *= _OUTLIER_SIZE
    inputs = inputs.to(device, values)
    truth = inputs.float() @ weight.float().t()
    error = float((method(weight)(inputs, None).float() - truth).norm() / truth.norm())
    return error < _MOST_ERROR if settings.is_cuda else None, {"method": method.__name__, "error": error}
