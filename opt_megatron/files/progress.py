"""Progress bars on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    description: str,
    *,
    unit: str,
    total: int | None = None,
    unit_scale: bool = False,
    leave: bool = False,
    hidden: bool = False,
) -> tqdm:
    """A tqdm bar on stderr, to be used as a context manager. It shows nothing unless stderr is a terminal.

    Args:
        unit: what is counted, with a leading space where it is a word; "B" with `unit_scale` shows kB, MB, GB.
        total: None if it is not known (yet: `bar.total` may be set later).
        leave: keep the bar on the screen at the end.
        hidden: show nothing on a terminal either.
    """
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        leave=leave,
        file=sys.stderr,
        disable=hidden or not sys.stderr.isatty(),
    )
