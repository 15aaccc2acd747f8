"""Sphinx builds the documentation with this: `sphinx-build -W docs docs/_build` (extra `docs`)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "opt_megatron"
author = "the authors of opt_megatron"
release = version = (ROOT / "opt_megatron" / "version.py").read_text(encoding="utf-8").split('"')[-2]

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
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
smartquotes = False  # they would turn the dashes of --options in tables into one
