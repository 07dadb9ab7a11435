"""Docstrings of this project are plain text with a few habits of Markdown; Sphinx expects reStructuredText.

Tables, and in modules indented equations, are shown as they stand; bars and stars (|x|, a * b) are characters and no markup.
"""

import re
from typing import Any

from sphinx.application import Sphinx


def to_restructured(lines: list[str], indented: bool) -> list[str]:
    """The lines with tables, and with `indented` everything that is set in, as literal blocks."""
    made: list[str] = []
    literal = False
    for line in lines:
        bare = line.strip()
        wanted = bare.startswith("|") or (indented and line.startswith("  ") and bool(bare))
        if bare and wanted != literal:
            made += ["", "::", ""] if wanted else [""]
            literal = wanted
        made.append(f"    {line}" if wanted else _escaped(line))
    return made


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if i % 2 else re.sub(r"([|*])", r"\\\1", part) for i, part in enumerate(parts))


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon reads the sections."""
    lines[:] = to_restructured(lines, indented=what == "module")


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen earlier than napoleon does (500)."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
