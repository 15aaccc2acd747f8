"""The PNG: a panel of bars for each size and workload."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import TITLES, ResultRow, distinct, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2  # for one size alone
_PANEL = (8.4, 4.0)  # inches
_COLORS = ("#1b6ca8", "#e08e2b", "#5a9e58", "#8a6fb0")  # this project first
_ALPHAS = (1.0, 0.5, 0.3)  # first dtype, second, third
_GROUP_WIDTH = 0.84  # of the distance between two cases


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Write the plot; every bar is a median, its whiskers are the lowest and the highest run."""
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    import matplotlib.pyplot as plt

    panels, columns = _arrange(result["rows"])
    if not panels:
        return
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        chosen = [row for row in result["rows"] if (row["size"], row["workload"]) == panel]
        axis.set_visible(bool(chosen))
        if chosen:
            axis.set_title(f"{panel[0]}, {TITLES[panel[1]]}", fontsize=10.5, loc="left")
            _panel(axis, chosen)
    figure.suptitle(_caption(result), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arrange(rows: list[ResultRow]) -> tuple[list[tuple[str, str]], int]:
    """(size, workload) of each panel, and the number of columns: one for each size where there are several."""
    sizes, workloads = distinct(row["size"] for row in rows), distinct(row["workload"] for row in rows)
    panels = [(size, workload) for workload in workloads for size in sizes]
    return panels, len(sizes) if len(sizes) > 1 else min(_COLUMNS, len(panels))


def _panel(axis: Axes, rows: list[ResultRow]) -> None:
    """Bars in groups by case, coloured by system, paler from one dtype to the next."""
    cases = distinct(_case(row, rows) for row in rows)
    bars = distinct((row["dtype"], system) for row in rows for system in row["systems"])
    systems, dtypes = distinct(system for _, system in bars), distinct(dtype for dtype, _ in bars)
    width = _GROUP_WIDTH / len(bars)
    for row in rows:
        middle = cases.index(_case(row, rows))
        for system, values in row["systems"].items():
            position = bars.index((row["dtype"], system))
            left = middle - _GROUP_WIDTH / 2 + position * width
            _bar(axis, left, width, values, systems.index(system), dtypes.index(row["dtype"]))
            if "limit" in row:
                axis.hlines(row["limit"], left, left + width, color="black", linewidth=1.6, zorder=3)
    axis.set_xticks(range(len(cases)), cases, fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.01, y=0.12)
    axis.set_ylim(bottom=0)
    _legend(axis, bars, systems, dtypes, limited=any("limit" in row for row in rows))


def _bar(axis: Axes, left: float, width: float, values: dict[str, Any], system: int, dtype: int) -> None:
    median, color, alpha = values["median"], _COLORS[system % len(_COLORS)], _ALPHAS[dtype % len(_ALPHAS)]
    axis.bar(left, median, width * 0.94, align="edge", color=color, alpha=alpha)
    middle = left + width * 0.47
    if len(values["samples"]) > 1:
        axis.vlines(middle, values["min"], values["max"], color="#404040", linewidth=0.9, zorder=2)
    top = (middle, max(median, values["max"]))
    label = f"{median / 1000:.1f}k" if median >= 1000 else number(median)  # narrow bars have no room for more
    axis.annotate(label, top, (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _legend(axis: Axes, bars: list[tuple[str, str]], systems: list[str], dtypes: list[str], *, limited: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=_COLORS[systems.index(s) % len(_COLORS)], alpha=_ALPHAS[dtypes.index(d) % 3], label=f"{s} {d}")
        for d, s in bars
    ]
    if limited:
        handles.append(Line2D([], [], color="black", linewidth=1.6, label="memory limit"))
    # To the right of the bars, which it would hide.
    axis.legend(handles=handles, fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _case(row: ResultRow, rows: list[ResultRow]) -> str:
    """The label of a group of bars: the metric if a panel has several, else the case."""
    return row["metric"] if len({row["metric"] for row in rows}) > 1 else row["case"]


def _caption(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    bandwidth = max(measured["gb_per_s"] for measured in result["bandwidth"])
    return (
        f"{machine['processor']}, {settings['threads']} threads, {settings['device']}, "
        f"memory reads {bandwidth:.1f} GB/s.  Less is better everywhere; bars are medians, whiskers the lowest and the "
        "highest run."
    )
