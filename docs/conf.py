"""Sphinx builds the documentation with this: `sphinx-build -W docs docs/_build` (extra `docs`)."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opt_megatron.version import __version__

project = "opt_megatron"
author = "the authors of opt_megatron"
release = version = __version__

extensions = ["myst_nb"]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # pages that are made from the code begin where the code's headings do
nb_execution_mode = "off"  # a test runs the notebook (tests/docs/test_tutorial.py)

html_theme = "pydata_sphinx_theme"
html_title = f"opt_megatron {release}"
html_theme_options = {"navigation_depth": 2, "show_toc_level": 2, "show_prev_next": True}
html_show_sourcelink = False
