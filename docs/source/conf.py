"""Sphinx: `sphinx-build docs/source docs/build` makes the pages as HTML (`pip install -e ".[docs]"` first)."""

project = "peft"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
