"""The tutorial notebook runs, and prints what it shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re

from doc_pages import DOCS

NOTEBOOK = DOCS / "tutorials" / "first_steps.ipynb"
_PATH = re.compile(r"/\S*/")  # of the installation
_TIME = re.compile(r"in \d+\.\d s")


def test_cells_print_what_the_notebook_shows(tmp_path, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source, written = "".join(cell["source"]), io.StringIO()
            with contextlib.redirect_stdout(written):
                exec(compile(source, str(NOTEBOOK), "exec"), names)
            shown = "".join(text for output in cell["outputs"] for text in output["text"])
            assert without_chance(written.getvalue()) == without_chance(shown), source
    assert os.listdir(tmp_path)


def without_chance(text: str) -> str:
    """Without what differs between machines."""
    return _TIME.sub("in ... s", _PATH.sub("", text))
