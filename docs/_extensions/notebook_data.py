"""Notebooks that need real data: without the file the page shows its code unexecuted and says so.

A notebook names its file in the front matter, `needs_data: NAME.h5ad`. `HILBERTCELL_REQUIRE=data` makes its absence an error.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

NOTE = """
:::{{warning}}
This page was built without its data: there is no `{name}` in the folder that `HILBERTCELL_DATA` names, so that nothing below
was executed and no figure is shown.
:::
"""


def without_data(app: Sphinx, docname: str, source: list[str]) -> None:
    """Switch execution off and put a note below the title. Raises: ExtensionError where data are required."""
    found = re.search(r"\A---\n.*?^needs_data: (\S+)$.*?^---$", source[0], re.DOTALL | re.MULTILINE)
    if found is None or (Path(os.environ["HILBERTCELL_DATA"]) / found[1]).is_file():
        return
    if "data" in re.split(r"[,\s]+", os.environ.get("HILBERTCELL_REQUIRE", "")):
        raise ExtensionError(
            f"{docname}: no {found[1]} in {os.environ['HILBERTCELL_DATA']} (required by HILBERTCELL_REQUIRE)"
        )
    text = source[0].replace(f"needs_data: {found[1]}", 'mystnb:\n  execution_mode: "off"')
    source[0] = re.sub(
        r"^(# .*\n)", lambda title: title[1] + NOTE.format(name=found[1]), text, count=1, flags=re.MULTILINE
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at every page before it is parsed."""
    app.connect("source-read", without_data)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
