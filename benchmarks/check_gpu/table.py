"""The result as a table: a line for each case."""

from __future__ import annotations

from typing import Any

from ..report import aligned

_WORDS = {True: "ok", False: "FAILED", None: "-"}
_WIDTH = 110  # of the figures


def format_table(result: dict[str, Any]) -> str:
    """Section, case, whether it passed, and its figures; errors on their own lines."""
    lines = []
    for section, found in result["sections"].items():
        lines += [(section, name, _WORDS[case["passed"]], _figures(case)) for name, case in found["cases"].items()]
        if "error" in found:
            lines.append((section, "", "FAILED", found["error"].strip().splitlines()[-1]))
    verdict = "all passed" if result["passed"] else f"{len(result['failed'])} failed"
    return "\n".join([*aligned(lines, left=4), f"{verdict}, {result['seconds']:.0f} s"])


def _figures(case: dict[str, Any]) -> str:
    text = case.get("error") or ", ".join(f"{name} {_show(value)}" for name, value in case["figures"].items())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."


def _show(value: Any) -> str:
    """A number with three significant digits; of several samples their median."""
    if isinstance(value, dict):
        inner = value.get("median")
        return _show(inner) if inner is not None else "(" + ", ".join(f"{k} {_show(v)}" for k, v in value.items()) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
