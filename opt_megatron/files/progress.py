"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


def progress_bar(
    description: str,
    *,
    unit: str,
    total: int | None = None,
    unit_scale: bool = False,
    leave: bool = False,
    delay: float = 0.0,
    hidden: bool = False,
) -> tqdm | ProgressLines:
    """A tqdm bar on stderr, to be used as a context manager; `ProgressLines` unless stderr is a terminal.

    Args:
        unit: what is counted, with a leading space where it is a word; "B" with `unit_scale` shows kB, MB, GB.
        total: None if it is not known (yet: `bar.total` may be set later).
        leave: keep the bar on the screen at the end.
        delay: seconds before the bar appears.
        hidden: show nothing on a terminal either.
    """
    if not hidden and not sys.stderr.isatty():
        return ProgressLines(description, unit=unit, total=total, unit_scale=unit_scale)
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        leave=leave,
        delay=delay,
        file=sys.stderr,
        disable=hidden,
    )


class ProgressLines:
    """Writes a line every `SECONDS_BETWEEN_LINES`, for logs; with the methods of tqdm that are used here.

    Attributes:
        total: may be set later.
    """

    def __init__(self, description: str, *, unit: str, total: int | None, unit_scale: bool) -> None:
        self.total = total
        self._description, self._unit, self._unit_scale = description, unit, unit_scale
        self._done: float = 0
        self._started = self._shown = time.monotonic()

    def update(self, count: float = 1) -> None:
        """Count what has been done since the last call."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        from tqdm import tqdm

        rate = "{rate_fmt}"
        if self.total is not None:
            rate = f"of {{total_fmt}} ({{percentage:.0f}}%), {rate}, {{remaining}} left"
        return tqdm.format_meter(
            self._done,
            self.total,
            seconds,
            unit=self._unit,
            unit_scale=self._unit_scale,
            bar_format=f"{self._description}: {{n_fmt}}{'' if self.total else self._unit} {rate}",
        )

    def clear(self) -> None:
        """Do nothing: a line stays."""

    def refresh(self) -> None:
        """Do nothing: the next line has it."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: the command's own last line follows."""
