"""How Sphinx turns docs/ into a site (`make docs`): warnings are errors, notebooks are executed, nothing is fetched.

Notebooks are MyST Markdown in `analyses/notebooks`, copied here as `tutorials`: prose is what most of their lines are, a
difference between two versions reads as text, outputs cannot be stored in them, and they are not Python modules that
layout, types and coverage would have to except.
"""

import importlib.metadata
import logging
import os
import shutil
import sys
from pathlib import Path

from jupyter_client.manager import KernelManager

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
# Notebooks run in a temporary folder, and their kernels inherit this.
os.environ["HILBERTCELL_DATA"] = str(
    Path(os.environ.get("HILBERTCELL_DATA", ROOT / "../shared/data")).resolve()
)

os.environ["PYTHONWARNINGS"] = (
    "ignore:IProgress not found"  # of tqdm: there are no progress bars on these pages
)

# Copies, because links between pages are resolved to where a file really is.
TUTORIALS = Path(__file__).parent / "tutorials"
shutil.rmtree(TUTORIALS, ignore_errors=True)
shutil.copytree(ROOT / "analyses/notebooks", TUTORIALS)

project = "hilbertcell"
release = importlib.metadata.version("hilbertcell")
copyright = "The hilbertcell contributors"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_nb",
    "generated_pages",
    "mathml",
    "notebook_data",
    "plain_docstrings",
]
exclude_patterns = ["_build", "_parts", "_extensions", "_templates"]
nitpicky = True
suppress_warnings = ["myst-nb.lexer", "ref.python"]  # cells that were not executed; attributes of one name
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other projects: their inventories lie in the network

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would know the notebook's code and not ours
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True

default_role = "literal"  # docstrings quote code with single backticks
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "exclude-members": "mannwhitneyu"
}  # SciPy's, which says that it is of the importing module
autosummary_generate = True
napoleon_use_ivar = True  # attributes of dataclasses are described once, in the table of their class
templates_path = ["_templates"]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"hilbertcell {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

# The kernel's own words on how it is started; with encryption there is nothing left to warn of.
KernelManager.transport_encryption.default_value = "auto"
for name in ("arviz", "traitlets"):  # they tell of every import and every notebook
    logging.getLogger(name).setLevel(logging.WARNING)
