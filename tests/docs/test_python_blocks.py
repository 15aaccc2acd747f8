"""The `python` blocks of the README and the guides run, from top to bottom of each page."""

from __future__ import annotations

import pytest
from doc_pages import GUIDES, blocks, page_name


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run(page, tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page, "python"):
        if block.not_run is None:
            # Line numbers of errors are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
