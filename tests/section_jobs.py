"""Generators of cases that the children of `tools/check_gpu.py`'s tests run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from benchmarks.check_gpu.case import Case, attempt
from opt_megatron.errors import UserError


def passes() -> Iterator[Case]:
    """Two cases, one of which claims nothing."""
    yield attempt("claimed", lambda: (True, {"number": 1.5}))
    yield attempt("measured", lambda: (None, {"number": 2}))


def fails() -> Iterator[Case]:
    """A claim that does not hold, an error, and a case after them."""
    yield attempt("false", lambda: (False, {}))
    yield attempt("broken", lambda: (None, {"number": 1 / 0}))
    yield attempt("after", lambda: (True, {}))


def crashes() -> Iterator[Case]:
    """A process that ends after its first case."""
    yield Case("first", True)
    os._exit(7)


def hangs() -> Iterator[Case]:
    """A process that does nothing after its first case."""
    yield Case("first", True)
    time.sleep(3600)


def refuses() -> Iterator[Case]:
    """A process that tells a user's mistake."""
    yield Case("first", True)
    raise UserError("no such thing")
