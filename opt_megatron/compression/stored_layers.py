"""Finished layers on any layout: collected on the leader, which writes them, and handed out when a run is resumed.

Only the leader's machine needs the directory. Methods are called on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.context import LEADER, ParallelContext, on_all_ranks
from .decoder_layer import LINEARS, RowRanks, layer_prefix, layer_shapes, own_block
from .output_directory import OutputDirectory
from .report import CompressionReport, LayerReport
from .stored_layout import SentTensor, StoredLayout

T = TypeVar("T")


class StoredLayers:
    """The leader's `OutputDirectory`, for all ranks.

    Args:
        output: on the leader; None on the others.
        layout: in which form the layers are stored.
    """

    def __init__(self, output: OutputDirectory | None, layout: StoredLayout, parallel: ParallelContext) -> None:
        self._output, self.layout, self._parallel = output, layout, parallel
        self._ranks = RowRanks(parallel)
        self.num_finished: int = parallel.broadcast_object(len(output.layers) if output is not None else None)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, make: Callable[[], OutputDirectory], layout: StoredLayout, parallel: ParallelContext
    ) -> Iterator[StoredLayers]:
        """Within the block, layers can be written and read.

        Args:
            make: called on the leader.

        Raises:
            UserError: the directory cannot be written; the same one on every rank.
        """
        with contextlib.ExitStack() as stack:
            output = on_all_ranks(parallel, lambda: stack.enter_context(make()) if parallel.is_leader else None)
            yield cls(output, layout, parallel)

    def write(self, number: int, part: dict[str, Tensor] | None, report: LayerReport | None, stage: int) -> None:
        """Store a layer.

        Args:
            part: this rank's part of what `StoredLayout.sent` names, on the ranks of the layer's pipeline stage.
            report: on the same ranks.
            stage: the pipeline stage that has the layer.

        Raises:
            UserError: it cannot be written; the same one on every rank.
        """
        reports = self._parallel.gather_objects(report)
        whole: dict[str, Tensor] = {}
        for name, sent in self.layout.sent(number).items():
            own = None if part is None else part.pop(name).to("cpu").contiguous()
            collected = self._collect(sent, own, stage)
            if collected is not None:
                whole[name] = collected
        made = next(one for one in reports if one is not None)
        self._on_leader(lambda output: output.write_layer(whole, made))

    def read(self, number: int, stage: int) -> dict[str, Tensor] | None:
        """A finished layer: this rank's part in float32, on the ranks of the layer's pipeline stage.

        Raises:
            CheckpointError: it cannot be read; the same one on every rank.
        """
        shapes = layer_shapes(self.layout.config, number)
        read = self._on_leader(lambda output: {name: output.read(layer_prefix(number) + name) for name in shapes})
        tensors = {}
        for name, shape in shapes.items():
            is_weight = name.endswith(".weight") and name.rpartition(".")[0] in LINEARS
            dtype = self.layout.read_dtype if is_weight else self.layout.dtype
            values = torch.empty(shape, dtype=dtype) if read is None else read[name].contiguous()
            dist.broadcast(values.view(torch.uint8), LEADER, group=self._parallel.control_group)
            if stage == self._parallel.pipeline_model_parallel_rank:
                own = values[own_block(name, shape, self._ranks)]
                tensors[name] = own.to(self._parallel.device, torch.float32, copy=True)
        return tensors or None

    def publish(self) -> CompressionReport:
        """Give the directory its name; returns the report, on every rank.

        Raises:
            UserError: it cannot be written; the same one on every rank.
        """
        report: CompressionReport = self._parallel.broadcast_object(self._on_leader(OutputDirectory.publish))
        return report

    def _on_leader(self, action: Callable[[OutputDirectory], T]) -> T | None:
        """The result on the leader, None elsewhere; an error is raised on all ranks."""
        output = self._output
        return on_all_ranks(self._parallel, lambda: None if output is None else action(output))

    def _collect(self, sent: SentTensor, own: Tensor | None, stage: int) -> Tensor | None:
        """The whole tensor on the leader, from the parts of the stage's tensor parallel ranks."""
        size = self._ranks.size if sent.has_rows else 1
        first, group = stage * self._parallel.pipeline_stride, self._parallel.control_group
        parts = []
        for rank in range(first, first + size):
            if self._parallel.rank == rank and own is not None and not self._parallel.is_leader:
                dist.send(own.view(torch.uint8), LEADER, group=group)
            elif self._parallel.rank == rank == LEADER and own is not None:
                parts.append(own)
            elif self._parallel.is_leader:
                part = torch.empty((sent.shape[0] // size, *sent.shape[1:]), dtype=sent.dtype)
                dist.recv(part.view(torch.uint8), rank, group=group)
                parts.append(part)
        return torch.cat(parts) if parts else None
