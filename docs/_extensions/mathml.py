"""Mathematics as MathML, made when the site is built: browsers show it by themselves, without a script or a network."""

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

CONVERTER = LatexToMathML(annotation=True)  # the LaTeX goes along, for copying and for screen readers


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write an inline formula; raises SkipNode, as all is written."""
    self.body.append(to_mathml(node, display=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed formula; raises SkipNode, as all is written."""
    self.body.append(f'<div class="formula" tabindex="0">{to_mathml(node, display=True)}</div>')
    raise nodes.SkipNode


def to_mathml(node: nodes.math | nodes.math_block, display: bool) -> str:
    """MathML of a formula. What cannot be converted is a warning, which ends `make docs`."""
    try:
        return CONVERTER.convert_with_local_state(node.astext().strip(), displaystyle=display)
    except LatexError as error:
        logging.getLogger(__name__).warning("mathematics: %s", error, location=node)
        return ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
