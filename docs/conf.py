"""How Sphinx turns docs/ into a site: Markdown with mathematics, warnings are errors (`make docs`)."""

import importlib.metadata

project = "hilbertcell"
release = importlib.metadata.version("hilbertcell")
copyright = "The hilbertcell contributors"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"hilbertcell {release}"
exclude_patterns = ["_build", "_parts"]
