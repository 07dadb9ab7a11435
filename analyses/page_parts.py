"""What pages are made of: figures as inline SVG with a text alternative, and sections that may lack theirs."""

import io
import re
import warnings
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

_COLUMN_INCHES = 5.2


@dataclass(frozen=True)
class PageFigure:
    """A figure as HTML, with what stands below it."""

    svg: Markup
    caption: str
    wide: bool
    """Whether it wants a row of the page for itself."""

    @classmethod
    def of(cls, name: str, figure: Figure, alt: str, caption: str = "") -> "PageFigure":
        """`name` is unique on the page, `alt` says in words what the figure shows."""
        return cls(inline_svg(figure, alt, name), caption, figure.get_figwidth() > _COLUMN_INCHES)


@dataclass(frozen=True)
class Section:
    """A part of a page; `absent` says why there are no figures."""

    anchor: str
    title: str
    lead: str
    figures: list[PageFigure] = field(default_factory=list)
    absent: str = ""

    def without(self, what: str) -> "Section":
        """The section of draws that hold no `what`."""
        return replace(self, figures=[], absent=f"Not shown: these draws hold no {what}.")


def inline_svg(figure: Figure, alt: str, name: str) -> Markup:
    """A figure as an <svg> element for an HTML page, with `alt` as its text alternative.

    Text stays text. `name` must be unique on the page: it keeps the ids of figures apart.
    """
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser brings the glyphs that matplotlib's own font lacks: text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces of inline SVG
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    head = f'<svg role="img" aria-label="{escape(alt)}" '
    return Markup(svg.replace("<svg ", head, 1))
