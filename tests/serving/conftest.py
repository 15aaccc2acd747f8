"""The server that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running_server import Running, running

from opt_megatron.parallel.context import ParallelContext


@pytest.fixture(scope="module")
def server(alone: ParallelContext) -> Iterator[Running]:
    """It is ready, and nothing runs on it."""
    with running(alone) as made:
        made.wait_for(lambda: made.request("GET", "/health").status == 200)
        yield made
