"""The pass over a checkpoint's decoder layers, on one rank of any tensor x pipeline x data parallel layout.

As in the programs of GPTQ, SparseGPT and Wanda, every layer is calibrated on what the compressed layers before it give:

    1. all samples go through the layer as it is, and statistics of its linears' inputs are summed
    2. its linears are compressed
    3. all samples go through the compressed layer; what comes out enters the next one

SmoothQuant's statistics are those of the model as it is, so where another step needs statistics too, there are two
streams of hidden states. A rank holds one layer, its samples' hidden states and the statistics: the model itself is
never loaded. Data parallel ranks have a part of the samples each, and pipeline stages work one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..parallel.context import ParallelContext, on_all_ranks
from .apply import compress_layer, round_to_dtype, smooth_layer
from .decoder_layer import LINEARS, READERS, DecoderLayer, RowRanks, embed, read_layer
from .recipe import Recipe
from .report import LayerReport
from .samples import CalibrationSamples
from .statistics import InputStatistics
from .stored_layers import StoredLayers


class LayerPass:
    """The pass over all layers.

    Args:
        source: the checkpoint that is compressed.
        samples: None if the recipe needs none.
        stored: takes the finished layers.
        on_linears: called with the number of linears that have been finished since the last call.
    """

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        parallel: ParallelContext,
        samples: CalibrationSamples | None,
        stored: StoredLayers,
        on_linears: Callable[[int], object],
    ) -> None:
        self._source, self._recipe, self._parallel, self._stored = source, recipe, parallel, stored
        self._layout, self._on_linears = stored.layout, on_linears
        self._ranks = RowRanks(parallel)
        own = () if samples is None else samples.tokens[parallel.data_parallel_rank :: parallel.data_parallel_size]
        self._samples = [torch.tensor(ids) for ids in own]
        # Hidden states [s, H] of each sample before the current layer: of the model as it is, and compressed.
        self._original: list[Tensor] | None = [] if recipe.smooth is not None else None
        self._compressed: list[Tensor] | None = [] if recipe.needs_inputs else None

    @torch.inference_mode()
    def run(self) -> None:
        """Compress all layers and store them; those that are stored already are only run.

        Raises:
            UserError: of any kind; the same one on every rank.
        """
        num_layers = self._source.config.num_layers
        per_stage = num_layers // self._parallel.pipeline_model_parallel_size
        self._embed()
        for number in range(num_layers):
            stage = number // per_stage
            if stage > 0 and number % per_stage == 0:
                self._hand_over(stage)
            if number < self._stored.num_finished:
                self._repeat(number, stage)
            else:
                self._compress(number, stage)
            self._on_linears(len(LINEARS))

    def _embed(self) -> None:
        has_samples = self._parallel.is_first_stage and self._samples
        embedded = on_all_ranks(
            self._parallel,
            lambda: embed(self._source, self._samples, self._parallel.device) if has_samples else [],
        )
        for stream in self._streams():
            stream += embedded

    def _streams(self) -> list[list[Tensor]]:
        return [stream for stream in (self._original, self._compressed) if stream is not None]

    def _hand_over(self, stage: int) -> None:
        """Pass the hidden states from the pipeline stage before `stage` to it."""
        own, stride = self._parallel.pipeline_model_parallel_rank, self._parallel.pipeline_stride
        for stream in self._streams():
            if own == stage - 1:
                for hidden in stream:
                    dist.send(hidden.contiguous(), self._parallel.rank + stride)
                stream.clear()
            elif own == stage:
                for sample in self._samples:
                    hidden = torch.empty(len(sample), self._source.config.hidden_size, device=self._parallel.device)
                    dist.recv(hidden, self._parallel.rank - stride)
                    stream.append(hidden)

    def _compress(self, number: int, stage: int) -> None:
        began = time.monotonic()
        tensors = self._read(number, stage)
        made = on_all_ranks(
            self._parallel, lambda: None if tensors is None else self._compress_own(number, tensors, began)
        )
        part, report = (None, None) if made is None else made
        self._stored.write(number, part, report, stage)
        if tensors is not None and self._compressed is not None:
            self._advance(self._compressed, number, tensors)

    def _read(self, number: int, stage: int) -> dict[str, Tensor] | None:
        """This rank's part of a layer of the source, if it belongs to the rank's pipeline stage."""
        is_own = stage == self._parallel.pipeline_model_parallel_rank
        device = self._parallel.device
        return on_all_ranks(
            self._parallel, lambda: read_layer(self._source, number, self._ranks, device) if is_own else None
        )

    def _compress_own(
        self, number: int, tensors: dict[str, Tensor], began: float
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """Compress this rank's part of a layer; returns what is stored of it, and the report."""
        recipe, where, firing = self._recipe, f"layer {number}", None
        inputs: dict[str, InputStatistics] = {}
        if self._original is not None:
            assert recipe.smooth is not None
            inputs = self._observe(self._original, number, tensors, is_last_pass=True)
            smooth_layer(tensors, self._source.config, inputs, recipe.smooth.alpha, self._ranks)
        if self._compressed is not None:
            inputs = self._observe(self._compressed, number, tensors, with_hessian=recipe.needs_hessian)
        if inputs:
            firing = inputs["fc2"].firing
        layout = self._layout
        linears, grids = compress_layer(tensors, inputs, recipe, self._ranks, layout.dtype, where, layout.scales)
        floats = tensors.keys() - {f"{name}.weight" for name in grids if layout.scales is not None}
        round_to_dtype(tensors, floats, layout.dtype, where)
        report = LayerReport(number, tuple(linears), firing, time.monotonic() - began)
        return layout.own_part(tensors, grids), report

    def _observe(
        self,
        stream: list[Tensor],
        number: int,
        tensors: dict[str, Tensor],
        *,
        with_hessian: bool = False,
        is_last_pass: bool = False,
    ) -> dict[str, InputStatistics]:
        """Statistics of what the layer's linears read.

        Args:
            is_last_pass: replace the stream's hidden states by the layer's outputs.
        """
        config, device = self._source.config, self._parallel.device
        widths = dict.fromkeys(READERS, config.hidden_size) | {"fc2": config.ffn_hidden_size}
        inputs = {
            name: InputStatistics(
                width, self._ranks, device, with_hessian=with_hessian, columns_at_once=config.head_dim
            )
            for name, width in widths.items()
        }
        layer = DecoderLayer(config, tensors, self._ranks)
        for index, hidden in enumerate(stream):
            output = layer(hidden, lambda name, values: inputs[name].add(values))
            if is_last_pass:
                stream[index] = output
        for name, statistics in inputs.items():
            statistics.finish(self._parallel)
            statistics.check_finite(f"layer {number}, {READERS[name][0]}")
        return inputs

    def _advance(self, stream: list[Tensor], number: int, tensors: dict[str, Tensor]) -> None:
        """Replace the hidden states before a layer by those after it; those after the last layer are not needed."""
        if number + 1 < self._source.config.num_layers:
            layer = DecoderLayer(self._source.config, tensors, self._ranks)
            for index, hidden in enumerate(stream):
                stream[index] = layer(hidden)

    def _repeat(self, number: int, stage: int) -> None:
        """Run a layer that is stored already."""
        if self._original is not None:
            tensors = self._read(number, stage)
            if tensors is not None:
                self._advance(self._original, number, tensors)
        if self._compressed is not None:
            tensors = self._stored.read(number, stage)
            if tensors is not None:
                self._advance(self._compressed, number, tensors)
