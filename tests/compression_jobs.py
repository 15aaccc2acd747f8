"""Jobs that ranks run for the tests of compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opt_megatron import OPT
from opt_megatron.compression.decoder_layer import DecoderLayer, RowRanks, embed, read_layer
from opt_megatron.compression.options import CalibrationOptions
from opt_megatron.compression.report import CompressionReport
from opt_megatron.errors import UserError
from opt_megatron.parallel.context import init_parallel


def opened(directory: Path, tp: int, pp: int) -> OPT:
    """A model on all ranks, those that are neither tensor nor pipeline parallel being data parallel."""
    return OPT.open(str(directory), init_parallel(tp, pp, device="cpu"))


def compressed(
    directory: Path, tp: int, pp: int, target: Path, recipe: Any, data: Path, options: dict[str, Any]
) -> CompressionReport:
    """Compress, and return the report."""
    calibration = CalibrationOptions(calibration_data=str(data))
    return opened(directory, tp, pp).compress(target, recipe, calibration, **options)


def interrupted(
    directory: Path,
    tp: int,
    pp: int,
    target: Path,
    recipe: Any,
    data: Path,
    layers: int,
    options: dict[str, Any] | None = None,
) -> None:
    """Compress, and stop after some layers, as Ctrl-C does."""
    done = [0]

    def stop(count: int) -> None:
        done[0] += count
        if done[0] == 6 * layers:
            raise KeyboardInterrupt

    try:
        compressed(directory, tp, pp, target, recipe, data, {**(options or {}), "on_linears": stop})
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing was interrupted")


def message_of(
    directory: Path, tp: int, pp: int, target: Path, recipe: Any, data: Path, options: dict[str, Any]
) -> str:
    """The message of a mistake."""
    try:
        compressed(directory, tp, pp, target, recipe, data, options)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def hidden_states(directory: Path, tp: int, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer and leaves the last one, [s, H], by the layers of the compression."""
    opt = opened(directory, tp, 1)
    checkpoint, ranks, device = opt.pretrained.checkpoint, RowRanks(opt.parallel), opt.parallel.device
    assert checkpoint is not None
    with torch.inference_mode():
        states = embed(checkpoint, [tokens], device)
        for number in range(opt.config.num_layers):
            layer = DecoderLayer(opt.config, read_layer(checkpoint, number, ranks, device), ranks)
            states.append(layer(states[-1]))
    return states


def logits(directory: Path, tp: int, quantization: str | None, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model as it is loaded."""
    return OPT.from_pretrained(
        str(directory), tensor_model_parallel_size=tp, quantization=quantization, device="cpu"
    ).logits(tokens)


def load_error(directory: Path, quantization: str) -> str:
    """The message of a mistake in loading."""
    try:
        OPT.from_pretrained(str(directory), quantization=quantization, device="cpu")
    except UserError as error:
        return str(error)
    return "nothing was raised"
