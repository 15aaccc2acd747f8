"""Loss curves of several runs as one PNG, from their metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MissingPackageError, UserError
from ..files import atomic_file
from .metrics import METRICS_FILE, read_metrics

MEASURES = (
    "loss",
    "perplexity",
    "accuracy",
    "lr",
    "grad_norm",
    "projected_gradient",
    "tokens_per_second",
    "loss_scale",
)


@dataclass
class Curve:
    """One measure of one run: (iteration, value) in training and in validation."""

    name: str
    train: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)


def read_curve(run: Path, measure: str) -> Curve:
    """Read a curve from a run's directory, or from a metrics file.

    Raises:
        UserError: there is no such file, or it does not have the measure.
    """
    path = run / METRICS_FILE if run.is_dir() else run
    curve = Curve(run.name if run.is_dir() else run.parent.name)
    try:
        entries = [entry for _, entry in read_metrics(path) if measure in entry]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}; give a directory that train --save has written") from None
    for entry in entries:
        points = curve.train if entry["kind"] == "train" else curve.valid
        points.append((entry["iteration"], float(entry[measure])))  # float() also of "inf", which JSON does not have
    if not curve.train and not curve.valid:
        raise UserError(f"{path}: has no {measure}")
    return curve


def plot_curves(curves: list[Curve], measure: str, output: Path) -> None:
    """Draw training as lines and validation as points with lines, one colour for each run.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "drawing", "plot") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats a token)" if measure == "loss" else measure)
    for number, curve in enumerate(curves):
        colour = f"C{number % 10}"
        if curve.train:
            axes.plot(*zip(*curve.train, strict=True), color=colour, alpha=0.6, label=f"{curve.name}, training")
        if curve.valid:
            label = f"{curve.name}, validation"
            axes.plot(*zip(*curve.valid, strict=True), color=colour, marker="o", markersize=4, label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(output) as partial:
        figure.savefig(partial, dpi=120, format="png")
