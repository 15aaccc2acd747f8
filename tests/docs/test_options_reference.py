"""The pages that are made from the declared options are current."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "make_options_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that writes them."""
    spec = importlib.util.spec_from_file_location("make_options_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.parametrize("name", ["cli", "sampling_parameters"])
def test_the_page_is_current(script: ModuleType, name: str) -> None:
    page: Path = getattr(script, name.upper())
    made = getattr(script, name)()
    assert page.read_text(encoding="utf-8") == made, "run python docs/make_options_reference.py"
