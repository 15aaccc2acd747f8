"""What a compression did, by layer: as JSON, as a table in Markdown, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingPackageError
from ..files import atomic_file, read_text, write_text_atomically
from .apply import LinearReport

REPORT_JSON, REPORT_MARKDOWN, REPORT_PICTURE = (f"compression_report.{ending}" for ending in ("json", "md", "png"))


@dataclass(frozen=True)
class LayerReport:
    """What compression did to a decoder layer.

    Attributes:
        linears: in the order in which they were compressed.
        firing: share of fc2's inputs above zero over the calibration tokens; None without calibration.
        seconds: of the layer, calibration included.
    """

    layer: int
    linears: tuple[LinearReport, ...]
    firing: float | None
    seconds: float


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        recipe: its steps.
        calibration: source, hash, number and tokens of the samples, and their seed; empty without any.
        notes: sentences for the user.
    """

    recipe: list[dict[str, Any]]
    calibration: dict[str, Any]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def zeros(self) -> float:
        """Share of zeros in all linears."""
        linears = [linear for layer in self.layers for linear in layer.linears]
        return sum(linear.zeros * linear.size for linear in linears) / sum(linear.size for linear in linears)

    @property
    def seconds(self) -> float:
        """That all layers took, those of interrupted runs included."""
        return sum(layer.seconds for layer in self.layers)

    def to_json(self) -> str:
        """The fields by name, and the summary."""
        return json.dumps(asdict(self) | {"zeros": self.zeros, "seconds": self.seconds}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """A title, the recipe, and a table with a row for every linear."""
        lines = ["# Compression", "", f"Recipe: `{json.dumps(self.recipe)}`", ""]
        if self.calibration:
            given = ", ".join(f"{name} {value}" for name, value in self.calibration.items())
            lines += [f"Calibration: {given}", ""]
        lines += ["| layer | linear | error | zeros | change of weights | seconds |", "|---|---|---|---|---|---|"]
        for layer in self.layers:
            lines += [_row(layer.layer, linear) for linear in layer.linears]
        lines += ["", f"Zeros: {self.zeros:.4%} of the linears' weights. Time: {self.seconds:,.1f} s.", ""]
        return "\n".join(lines)


def write_report(report: CompressionReport, directory: Path) -> None:
    """Write the report's JSON, Markdown and picture.

    Raises:
        MissingPackageError: matplotlib is not installed; the other files are written.
        UserError: a file cannot be written.
    """
    write_text_atomically(directory / REPORT_JSON, report.to_json())
    write_text_atomically(directory / REPORT_MARKDOWN, report.to_markdown())
    _draw(report, directory / REPORT_PICTURE)


def read_layers(directory: Path) -> tuple[LayerReport, ...]:
    """The layers of a report that `write_report` or an interrupted run has written.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / REPORT_JSON
    try:
        entries = json.loads(read_text(path))["layers"]
        return tuple(
            LayerReport(**entry | {"linears": tuple(LinearReport(**linear) for linear in entry["linears"])})
            for entry in entries
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a report: {type(error).__name__}") from None


def _row(layer: int, linear: LinearReport) -> str:
    error = "" if linear.error is None else f"{linear.error:.6g}"
    cells = (str(layer), linear.name, error, f"{linear.zeros:.5f}", f"{linear.change:.5f}", f"{linear.seconds:.2f}")
    return f"| {' | '.join(cells)} |"


def _draw(report: CompressionReport, path: Path) -> None:
    """Draw the change of the weights, and the zeros, by layer, a line for each kind of linear."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", f"drawing {path.name}", "plot") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    numbers = [layer.layer for layer in report.layers]
    for axes, measure, label in zip(
        figure.subplots(1, 2), ("change", "zeros"), ("change of weights (relative norm)", "share of zeros"), strict=True
    ):
        for name, values in _by_linear(report.layers, measure).items():
            axes.plot(numbers, values, marker="o", markersize=3, label=name.removeprefix("self_attn."))
        axes.set(xlabel="layer", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _by_linear(layers: Sequence[LayerReport], measure: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for layer in layers:
        for linear in layer.linears:
            values.setdefault(linear.name, []).append(getattr(linear, measure))
    return values
