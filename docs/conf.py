"""The site: Sphinx over the Markdown of this folder. ``make docs`` builds it, strictly and without network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "fxquant"
copyright = "the fxquant authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "reference"]
exclude_patterns = ["extensions"]

html_theme = "furo"
html_title = "fxquant"
html_copy_source = False
pygments_dark_style = "github-dark"

myst_heading_anchors = 4  # links such as config.md#gptq
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
smartquotes = False  # -- is an option, not a dash
nitpick_ignore_regex = [(r"py:.*", r".*")]  # types in signatures: torch's, and aliases; links between pages are checked
