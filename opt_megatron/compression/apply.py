"""A recipe's steps on one decoder layer, whose matrices are replaced by their compressed values."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import OPTConfig
from ..errors import UserError
from .column_solver import Curvature, NotPositiveDefiniteError
from .decoder_layer import READERS, RowRanks
from .gptq import Solved, gptq
from .grid import GroupedGrids, round_to_nearest
from .magnitude import magnitude_mask
from .recipe import Prune, Recipe
from .smoothquant import smoothing_factors
from .sparsegpt import sparsegpt
from .statistics import InputStatistics
from .wanda import wanda_mask

_ROWS = 256  # of a matrix that are compared at once


@dataclass(frozen=True)
class LinearReport:
    """What compression did to one linear.

    Attributes:
        name: the end of its canonical name, as fc1.
        size: number of its weights.
        error: as GPTQ's and SparseGPT's programs report it; None of methods that make no such error.
        zeros: share of zeros.
        change: norm of the weights' change over the norm of the weights.
        seconds: that it took.
    """

    name: str
    size: int
    error: float | None
    zeros: float
    change: float
    seconds: float


def smooth_layer(
    tensors: dict[str, Tensor], config: OPTConfig, inputs: dict[str, InputStatistics], alpha: float, ranks: RowRanks
) -> None:
    """Smooth the inputs of a layer's linears by SmoothQuant; the layer's function stays the same.

    In a pre-norm layer the norms before q, k, v and before fc1 are divided, as in SmoothQuant's program. A post-norm
    layer reads the residual stream itself, which nothing can divide: there the inputs of out_proj and of fc2 are
    smoothed, whose channels v_proj and, behind ReLU, fc1 make.
    """
    if config.do_layer_norm_before:
        divided = {"attention": "self_attn_layer_norm", "fc1": "final_layer_norm"}
    else:
        divided = {"out_proj": "self_attn.v_proj", "fc2": "fc1"}
    for read, source in divided.items():
        weights = [tensors[f"{name}.weight"] for name in READERS[read]]
        largest = ranks.max(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
        factors = smoothing_factors(inputs[read].largest, largest, alpha)
        for weight in weights:
            weight *= factors
        weight, bias = tensors[f"{source}.weight"], tensors[f"{source}.bias"]
        made = factors if weight.dim() == 1 else factors[ranks.own(len(factors))]
        weight /= made if weight.dim() == 1 else made[:, None]
        bias /= made


def compress_layer(
    tensors: dict[str, Tensor],
    inputs: dict[str, InputStatistics],
    recipe: Recipe,
    ranks: RowRanks,
    dtype: torch.dtype,
    where: str,
    scales: torch.dtype | None = None,
) -> tuple[list[LinearReport], dict[str, GroupedGrids]]:
    """Prune and quantise the linears of a layer; called on all ranks that hold rows of them.

    Args:
        tensors: this rank's part of the layer; weights are replaced by values that `dtype` holds.
        inputs: of what is read, as `decoder_layer.READERS` names it; the Hessians are used up. Empty if no method
            needs any.
        dtype: in which the weights will be stored.
        where: names the layer in messages.
        scales: the weights will be stored as integers with scales of this dtype; None: as floats.

    Returns:
        a report of every linear, and the grids of those that were quantised.

    Raises:
        UserError: a Hessian cannot be factored; on all of these ranks.
    """
    reports, grids = [], {}
    for read, names in READERS.items():
        statistics = inputs.pop(read, None)
        curvature = _curvature(recipe, statistics, f"{where}, {names[0]}")
        for name in names:
            began, weight = time.monotonic(), tensors[f"{name}.weight"]
            solved = _compress_linear(weight, statistics, curvature, recipe, ranks)
            if name == names[-1]:
                curvature = None  # fc2's is the largest thing of all, and has done its work
            if scales is not None and solved.grids is not None:
                tensors[f"{name}.weight"], grids[name] = solved.grids.in_dtype(solved.weight, scales)
            else:
                tensors[f"{name}.weight"] = solved.weight.to(dtype).float()
            error = solved.error
            del solved  # a copy of the weight
            reports.append(_report(name, error, weight, tensors[f"{name}.weight"], began, ranks))
    return reports, grids


def _curvature(recipe: Recipe, statistics: InputStatistics | None, where: str) -> Curvature | None:
    if not recipe.needs_hessian:
        return None
    assert statistics is not None and statistics.hessian is not None
    hessian, statistics.hessian = statistics.hessian, None
    act_order = recipe.quantize is not None and recipe.quantize.act_order
    try:
        return Curvature.of(hessian, recipe.damping, largest_first=act_order)
    except NotPositiveDefiniteError as error:
        raise UserError(f"{where}: {error}") from None


def _compress_linear(
    weight: Tensor, statistics: InputStatistics | None, curvature: Curvature | None, recipe: Recipe, ranks: RowRanks
) -> Solved:
    quantize, zeros, error = recipe.quantize, None, None
    is_gptq = quantize is not None and quantize.method == "gptq"
    if recipe.prune is not None and recipe.prune.method == "sparsegpt":
        assert curvature is not None
        solved = sparsegpt(weight, curvature, recipe.prune, ranks.sum, quantize if is_gptq else None)
        if quantize is None or is_gptq:
            return solved
        weight, error = solved.weight, solved.error
    elif recipe.prune is not None:
        zeros = _mask(weight, statistics, recipe.prune, ranks)
        weight = weight.masked_fill(zeros, 0)
    if quantize is None:
        return Solved(weight, error)
    if is_gptq:
        assert curvature is not None
        return gptq(weight, curvature, quantize, zeros)
    rounded, grids = round_to_nearest(weight, quantize)
    return Solved(rounded, error, grids)


def _mask(weight: Tensor, statistics: InputStatistics | None, prune: Prune, ranks: RowRanks) -> Tensor:
    if prune.method == "magnitude":
        return magnitude_mask(weight, prune, ranks.sum)
    assert statistics is not None
    return wanda_mask(weight, statistics.squared_norms / statistics.samples, prune)


def _report(
    name: str, error: float | None, before: Tensor, after: Tensor, began: float, ranks: RowRanks
) -> LinearReport:
    numbers = [
        error or 0.0,
        float((after == 0).sum()),
        float(after.numel()),
        _squared_change(before, after),
        float(torch.linalg.vector_norm(before)) ** 2,
    ]
    sums = ranks.sum(torch.tensor(numbers, dtype=torch.float64, device=before.device))
    total, zeros, count, changed, norm = sums.tolist()
    return LinearReport(
        name=name,
        size=int(count),
        error=None if error is None else total,
        zeros=zeros / count,
        change=(changed / norm) ** 0.5 if norm else 0.0,
        seconds=time.monotonic() - began,
    )


def _squared_change(before: Tensor, after: Tensor) -> float:
    """The squared norm of a matrix's change, some rows at a time."""
    parts = zip(before.split(_ROWS), after.split(_ROWS), strict=True)
    return sum(float(torch.linalg.vector_norm(new - old)) ** 2 for old, new in parts)


def round_to_dtype(tensors: dict[str, Tensor], names: Iterable[str], dtype: torch.dtype, where: str) -> None:
    """Round some float32 tensors of a layer to the values that are stored: what follows is calibrated on those.

    Raises:
        UserError: a value is not finite, or too large for `dtype`.
    """
    for name in names:
        tensor = tensors[name]
        if not tensor.isfinite().all():
            raise UserError(f"{where}, {name}: holds values that are not finite: the checkpoint is damaged")
        stored = tensor.to(dtype).float()
        if not stored.isfinite().all():
            largest = float(tensor.abs().max())
            raise UserError(
                f"{where}, {name}: holds {largest:.4g}, which {str(dtype).removeprefix('torch.')} cannot: "
                "give --dtype bfloat16 or float32"
            )
        tensors[name] = stored
