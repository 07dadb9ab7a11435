"""Assemble docs/benchmarks.md from the parts that benchmarks write, so that it reads without a site."""

from pathlib import Path

PARTS = ("bodenmiller", "kang", "count_transport")
HEAD = """# Benchmarks

All figures on this page are written by `make bench` (real data needed; see the README). Each table names its command,
ratios stand beside their jackknife standard errors over batches, and per-batch values follow. Only the sampling noise of the
truth is taken off squared errors or added to draws; the null adds the mean shift of the training batches to the new
batch's controls, with the spread between batches.
"""


def assemble(docs: Path) -> str:
    """The page from the parts found in `docs/_parts`; a part that is missing is said to be missing."""
    sections = [HEAD]
    for name in PARTS:
        part = docs / "_parts" / f"{name}.md"
        sections.append(part.read_text() if part.exists() else f"*{name}: not run.*\n")
    return "\n".join(sections)


if __name__ == "__main__":
    folder = Path("docs")
    (folder / "benchmarks.md").write_text(assemble(folder))
