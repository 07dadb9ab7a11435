"""Assemble docs/benchmarks.md from the parts that benchmarks write: `python -m hilbertcell.analyses.benchmark_page`."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

HEAD = """# Benchmarks

Written by `make bench` (it needs the real data, see the README); nothing on this page is typed by hand but the words.
Machine: {machine}. Ratios stand beside their jackknife standard errors over batches, per-batch values follow. Truth is
the absolute mean of a held-out population: only its own sampling noise is taken off squared errors or added to draws.
Verdicts follow one rule: a model loses to a baseline if the mean of its paired per-batch differences exceeds
t(0.95, D - 1) sd / sqrt(D), Holm-adjusted over baselines.
"""

SECTIONS = {
    "bodenmiller_plain": """## A donor whose controls alone are known (`bodenmiller_bcrxl_cytof`)

`python -m hilbertcell.analyses.first_benchmarks --only bodenmiller`. Leave one of six donors out; 5 cell types (without
`Other`) x 24 markers, each in units of its standard deviation over all cells. The null adds the mean shift of the training
donors to the new controls, with the noise-corrected spread between donors.

With shuffled donor labels the gain over the null of the true labels disappears. Against a null that is shuffled as well it
would not: shuffling ruins that null, and a slope near -1 then recovers the training mean.
""",
    "bodenmiller_few_shot": """## The same with 20 stimulated cells of one cell type

The 20 cells are of one type, scores are on the other types: mean over the types and over 20 choices of the cells.
""",
    "kang_cells": """## Cells of a donor whose controls alone are known (`kang_ifnb_wide`)

`python -m hilbertcell.analyses.first_benchmarks --only kang`. Leave one of six donors out; units of at least 20 stimulated
and 40 control cells. Controls are split in two: one half is transported, the other is the reference for differential
expression of prediction and truth alike. Beside: real stimulated cells of the training donors. These figures precede the
last change of count transport and have to be made again: donor 101 then gave hilbertcell an energy distance of 0.134
where this table rests on 0.067.
""",
    "count_transport": """## Count transport given the true means (`papalexi_eccite_crispr`)

`python -m hilbertcell.analyses.transport_benchmark --seeds 1`. Two kinds of target: the means of the true cells themselves, and source
means plus the mean effect measured on other cells.
""",
}


def assemble(docs: Path) -> str:
    """The page from the parts found in `docs/_parts`; a part that is missing is said to be missing."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "numpy"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}"
    page = [HEAD.format(machine=machine)]
    for name, words in SECTIONS.items():
        part = docs / "_parts" / f"{name}.md"
        page += [words, part.read_text() if part.exists() else "*Not run.*\n"]
    return "\n".join(page)


if __name__ == "__main__":
    folder = Path("docs")
    (folder / "benchmarks.md").write_text(assemble(folder))
