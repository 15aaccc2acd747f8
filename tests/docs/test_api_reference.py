"""The pages that are made from the code are current."""

import importlib.util

from doc_pages import DOCS

_SPEC = importlib.util.spec_from_file_location("make_api_reference", DOCS / "make_api_reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)
AGAIN = "run: python docs/make_api_reference.py"


def test_python_api_is_current():
    assert reference.PYTHON_API.read_text(encoding="utf-8") == reference.python_api(), AGAIN


def test_http_api_is_current():
    assert reference.HTTP_API.read_text(encoding="utf-8") == reference.http_api(), AGAIN
