"""Sphinx configuration."""

import loopos

project = "loopos"
author = "The loopos developers"
copyright = "2026, the loopos developers"
version = release = loopos.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"loopos {release}"
html_extra_path = ["configuration.schema.json"]
myst_heading_anchors = 3
autodoc_typehints = "none"
nitpicky = False
suppress_warnings = ["ref.python"]  # each method has its own Options
