"""For the tests of benchmarks/: children start quickly."""

from __future__ import annotations

import pytest
from ranks import forkserver


@pytest.fixture(autouse=True)
def children_of_the_forkserver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children have torch and Megatron-core imported when they start; what they compute is the same."""
    monkeypatch.setattr("benchmarks.worker.multiprocessing.get_context", lambda method: forkserver())
