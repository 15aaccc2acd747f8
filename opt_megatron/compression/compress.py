"""Compression of a checkpoint into another one, at any tensor x pipeline x data parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.conversion_options import ConversionOptions
from ..config import check_dtype
from ..errors import UserError
from ..parallel.context import on_all_ranks
from ..pretrained import Pretrained
from .decoder_layer import layer_prefix
from .layer_pass import LayerPass
from .options import CalibrationOptions
from .output_directory import OutputDirectory
from .recipe import Recipe
from .report import CompressionReport
from .samples import CalibrationSamples, read_samples
from .stored_layers import StoredLayers
from .stored_layout import make_layout


def compress_pretrained(
    pretrained: Pretrained,
    target: Path,
    recipe: Recipe,
    calibration: CalibrationOptions,
    *,
    to: str = "hf",
    dtype: str | None = None,
    force: bool = False,
    resume: bool = False,
    on_linears: Callable[[int], object] = lambda count: None,
) -> CompressionReport:
    """Write a compressed copy of an opened checkpoint; called on every rank.

    Args:
        target: the directory to write.
        calibration: where samples come from, if the recipe needs any. The leader reads them.
        to: "hf", weights as floats, or "gptq", as integers.
        dtype: of the floats that are written; by default the checkpoint's.
        force: replace a target that is a checkpoint already.
        resume: continue what an interrupted run with the same source and settings has written.
        on_linears: called with the number of linears that have been finished since the last call.

    Returns:
        the report, on every rank.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    parallel, source = pretrained.parallel, pretrained.checkpoint
    if source is None:
        raise UserError(f"{pretrained.name} was not opened from a checkpoint, so there is nothing to compress")
    recipe.check_fits(pretrained.config)
    options = ConversionOptions(to="hf", dtype=dtype)
    layout = make_layout(to, source, _stored_dtype(source, dtype), options, recipe)
    samples = _samples(pretrained, recipe, calibration)
    settings = {"recipe": recipe.to_list(), "calibration": _described(samples, calibration.seed)}

    def make() -> OutputDirectory:
        return OutputDirectory(
            source,
            target,
            settings,
            layout,
            options=options,
            tokenizer=pretrained.tokenizer_directory,
            force=force,
            resume=resume,
        )

    with StoredLayers.open(make, layout, parallel) as stored:
        LayerPass(source, recipe, parallel, samples, stored, on_linears).run()
        return stored.publish()


def _samples(pretrained: Pretrained, recipe: Recipe, calibration: CalibrationOptions) -> CalibrationSamples | None:
    """The samples that the leader has drawn, on every rank; None if the recipe needs none."""
    parallel = pretrained.parallel
    if not recipe.needs_samples:
        return None
    if calibration.calibration_data is None:
        raise UserError("the recipe needs calibration: give --calibration-data, a text or JSON lines")

    def read() -> CalibrationSamples | None:
        if not parallel.is_leader:
            return None
        samples = read_samples(calibration, pretrained.config, pretrained.tokenizer)
        if len(samples.tokens) < parallel.data_parallel_size:
            count = len(samples.tokens)
            raise UserError(f"{count} calibration samples cannot be divided over {parallel.data_parallel_size} ranks")
        return samples

    drawn: CalibrationSamples = parallel.broadcast_object(on_all_ranks(parallel, read))
    return drawn


def _stored_dtype(source: Checkpoint, dtype: str | None) -> torch.dtype:
    if dtype is None:
        return source.tensors[f"{layer_prefix(0)}fc1.weight"].dtype
    check_dtype(dtype)
    return getattr(torch, dtype)  # type: ignore[no-any-return]


def _described(samples: CalibrationSamples | None, seed: int) -> dict[str, Any]:
    if samples is None:
        return {}
    lengths = [len(ids) for ids in samples.tokens]
    return {
        "data": Path(samples.source).name,
        "sha256": samples.sha256,
        "samples": len(lengths),
        "tokens": sum(lengths),
        "seed": seed,
    }
