"""The table of a result, with the limit set by the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
ResultRow = dict[str, Any]
TITLES = {
    "prefill": "prefill: ms of a call that makes one token",
    "decode": "decode: ms a step, by rows of the batch",
    "context": "context: ms a step of one row, by the tokens before it",
    "mixed": "mixed workload, all requests at once: seconds",
    "poisson": "mixed workload, arriving as a Poisson stream: seconds",
    "memory": "memory of a fresh process: MB resident (libraries, peaks) and of its own (growth)",
    "tensor_parallel": "tensor parallel: ms a step",
    "training": "training: ms a step, and MB that the process grows by",
}


def add_limits(result: dict[str, Any]) -> None:
    """Give every row that reads known bytes its limit in ms, by the best bandwidth found so far."""
    if not result["bandwidth"]:
        return
    bandwidth = max(measured["gb_per_s"] for measured in result["bandwidth"]) * 1e9
    for row in result["rows"]:
        if "limit_bytes" in row:
            row["limit"] = row["limit_bytes"] / bandwidth * 1e3
            for values in row["systems"].values():
                values["over_limit"] = values["median"] / row["limit"]


def format_table(result: dict[str, Any]) -> str:
    """All rows for people, a section for each size and workload."""
    parts = [_header(result)]
    for size in distinct(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        parts.append(f"== {size}: {result['models'][size]['parameters'] / 1e6:,.0f} million parameters ==")
        parts += [_equality(entry) for entry in result["equality"] if entry["size"] == size]
        parts += [_tuned(entry) for entry in result["tuned"] if entry["size"] == size]
        for workload in distinct(row["workload"] for row in rows):
            parts.append(_section([row for row in rows if row["workload"] == workload], workload))
    parts += [f"note: {note}" for note in result["notes"]]
    return "\n".join(parts)


def _header(result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    best = max(result["bandwidth"], key=lambda measured: measured["gb_per_s"])
    repeats = f"{settings['repeats']} runs each in turn ({settings['mixed_repeats']} of a stream of requests)"
    return "\n".join(
        (
            f"{machine['processor']}, {machine['cores']} cores, {settings['threads']} threads, {settings['device']}",
            versions,
            f"memory reads {best['gb_per_s']:.1f} GB/s ({max(best['kernels'], key=best['kernels'].get)})",
            f"median [lowest-highest] of {repeats}; x = its median / the first column's: above 1 it is slower",
        )
    )


def _equality(entry: dict[str, Any]) -> str:
    """One line: float32 must be equal; with other dtypes each system rounds differently."""
    counts = [
        f"{system} {counts['equal']} of {counts['tokens']} ({counts['equal_rows']} of {counts['rows']} rows)"
        for system, counts in entry["systems"].items()
    ]
    different = any(counts["equal"] != counts["tokens"] for counts in entry["systems"].values())
    alarm = "  ** OUTPUTS DIFFER **" if different and entry["dtype"] == "float32" else ""
    return f"equal tokens, {entry['dtype']}, {entry['what']}: {', '.join(counts) or 'nothing to compare'}{alarm}"


def _tuned(entry: dict[str, Any]) -> str:
    best = min(entry["seconds"], key=entry["seconds"].get)
    tried = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in entry["seconds"].items())
    return f"{entry['system']} {entry['dtype']} serves {best} (tried: {tried})"


def _section(rows: list[ResultRow], workload: str) -> str:
    systems = distinct(system for row in rows for system in row["systems"])
    limited = any("limit" in row for row in rows)
    has_metrics = len({row["metric"] for row in rows}) > 1
    header = ["dtype", "case", *(["what"] if has_metrics else []), systems[0]]
    for system in systems[1:]:
        header += [system, "x"]
    header += ["limit", f"{systems[0]} / limit"] if limited else []
    lines = [header]
    for row in rows:
        names = [row["dtype"], row["case"], *([row["metric"]] if has_metrics else [])]
        cells = [_cell(row, systems[0])]
        for system in systems[1:]:
            cells += [_cell(row, system), number(row["systems"].get(system, {}).get("ratio"))]
        cells += [number(row.get("limit")), number(_ours(row).get("over_limit"))] if limited else []
        lines.append(names + cells)
    body = aligned(lines, left=header.index(systems[0]))
    return "\n".join(["", TITLES[workload], *body, *_throughput(rows, workload), *_growth(rows), *_losses(rows)])


def _throughput(rows: list[ResultRow], workload: str) -> list[str]:
    """Tokens per second of the mixed workload, until the last request is done, and of training."""
    return [
        f"{row['dtype']}, tokens a second: {', '.join(f'{s} {number(v)}' for s, v in row['tokens_per_second'].items())}"
        for row in rows
        if workload == "mixed" or (workload == "training" and "tokens_per_second" in row)
    ]


def _losses(rows: list[ResultRow]) -> list[str]:
    """For training: whether all have computed the same."""
    return [
        f"{row['dtype']}, {row['case']}: the losses of one batch are apart from {row['loss']:.5f} by "
        + ", ".join(f"{s} {v:.1e}" for s, v in row["loss_apart"].items() if s != next(iter(row["systems"])))
        for row in rows
        if "loss_apart" in row
    ]


def _growth(rows: list[ResultRow]) -> list[str]:
    """How much slower a step is at the longest context than at the shortest, and the time to read its larger cache."""
    lines = []
    for dtype in distinct(row["dtype"] for row in rows):
        first, *_, last = 2 * [row for row in rows if row["dtype"] == dtype and "cache_bytes" in row] or [{}, {}]
        if not first or first is last or "limit" not in first:
            continue
        grown = ", ".join(
            f"{system} {values['median'] - first['systems'][system]['median']:+.2f} ms"
            for system, values in last["systems"].items()
        )
        bytes_more = last["cache_bytes"] - first["cache_bytes"]
        lines.append(
            f"{dtype}, from {first['case']} to {last['case']}: {grown}; "
            f"reading {bytes_more / 1e6:,.1f} MB more takes {last['limit'] - first['limit']:.2f} ms"
        )
    return lines


def _cell(row: ResultRow, system: str) -> str:
    values = row["systems"].get(system)
    if values is None:
        return "-"
    median, low, high = (number(values[key]) for key in ("median", "min", "max"))
    return median if len(values["samples"]) == 1 else f"{median} [{low}-{high}]"


def _ours(row: ResultRow) -> dict[str, Any]:
    return next(iter(row["systems"].values()))


def number(value: float | None) -> str:
    """Formatted with about three significant digits."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:,.{digits}f}"


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Columns of equal width; the first `left` ones begin at the left, numbers end at the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = []
    for line in lines:
        cells = [c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True))]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in the order of the first ones."""
    return list(dict.fromkeys(items))
