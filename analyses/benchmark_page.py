"""Assemble docs/benchmarks.md from the parts that benchmarks write: `python -m hilbertcell.analyses.benchmark_page`."""

import argparse
import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

HEAD = """# Benchmarks

Written by `make bench` (it needs the real data, see the README); nothing on this page is typed by hand but the words.
Machine: {machine}. Every section says when it was made, how long that took, and the load of the machine
when it began. Ratios stand beside their jackknife standard errors over batches, per-batch values follow. Truth is
the absolute mean of a held-out population: only its own sampling noise is taken off squared errors or added to draws.
Verdicts follow one rule: a model loses to a baseline if the mean of its paired per-batch differences exceeds
t(0.95, D - 1) sd / sqrt(D), Holm-adjusted over baselines.
"""

SECTIONS = {
    "grid": """## Every shared screen and split

`hilbertcell benchmark --config analyses/benchmarks/shared.toml --out .benchmark`; what the columns mean, and which splits are
made of which screen, is said in [evaluation](evaluation.md). With fewer than four batches (`papalexi`, `ova`) every verdict
is 'undecided'.

![CRPS of every model as a multiple of the null, coloured by verdicts](images/benchmark.png)
""",
    "bodenmiller_plain": """## A donor whose controls alone are known (`bodenmiller_bcrxl_cytof`)

`python -m hilbertcell.analyses.first_benchmarks --only bodenmiller`. Leave one of six donors out; 5 cell types (without
`Other`) x 24 markers, each in units of its standard deviation over all cells. The null adds the mean shift of the training
donors to the new controls, with the noise-corrected spread between donors.

With shuffled donor labels the gain over the null of the true labels disappears. Against a null that is shuffled as well it
would not: shuffling ruins that null, and a slope near -1 then recovers the training mean.
""",
    "bodenmiller_few_shot": """## The same with 20 stimulated cells of one cell type

The 20 cells are of one type, scores are on the other types: mean over the types and over the choices of
the cells (`--few-shot-draws`).
""",
    "kang_cells": """## Cells of a donor whose controls alone are known (`kang_ifnb_wide`)

`python -m hilbertcell.analyses.first_benchmarks --only kang`. Leave one of six donors out; units of at least 20 stimulated
and 40 control cells. Controls are split in two: one half is transported, the other is the reference for differential
expression of prediction and truth alike. Beside: real stimulated cells of the training donors.
""",
    "simulated_unseen_batch": """## Simulated donors: unseen batches

`python -m hilbertcell.analyses.simulated_benchmark --only unseen_batch`. Worlds of `SimulatorSettings` (300 genes, 3 contexts,
A, B, A+B and an inert perturbation, mixed responders) with 24 training and 8 test batches, whose settings were fixed before
any model was fitted to them. The oracle knows the world and sees the same controls: what lies between it and the null is
all that can be won. It covers less than 90 % where the mean of a rare gene in few cells is not Gaussian, and so do all.
""",
    "simulated_unseen_pair": """## Simulated donors: unseen (context, perturbation) pairs

`python -m hilbertcell.analyses.simulated_benchmark --only unseen_pair`. A quarter of the pairs is hidden in all 32 batches.
The null is the perturbation mean: its mean shift in the other contexts, added to the given controls. The oracle knows what
is particular to the hidden pairs, which nobody can: it is a floor, not a goal.
""",
    "simulated_unseen_perturbation": """## Simulated donors: unseen perturbations

`python -m hilbertcell.analyses.simulated_benchmark --only unseen_perturbation`. 20 perturbations with 4 features that explain
70 % of the variance of effects, 2 contexts, 24 batches; 4 perturbations are hidden. The null is the mean over perturbations:
their mean shift in the context, added to the given controls. Uninformative features are random numbers.
""",
    "simulated_structure": """## Simulated donors: do hidden factors earn their place?

`python -m hilbertcell.analyses.simulated_benchmark --only structure`. Log score of whole test batches as never seen, of a fit with
hidden factors less that of a fit without; larger is better. In a second world nothing is hidden, and nothing may be lost.
""",
    "calibration": """## Are the posteriors right? (simulated from the program)

`python -m hilbertcell.analyses.calibration_benchmark`. Simulation-based calibration of NUTS, of a sampler that is wrong on
purpose, and of variational inference; joint coverage of all quantities by TARP. Invariants and predictions are compared,
loadings and microenvironments alone are known up to rotation.
""",
    "count_transport": """## Count transport given the true means (`papalexi_eccite_crispr`)

`python -m hilbertcell.analyses.transport_benchmark`. Five kinds of target and two ceilings: what the best decoder could reach
with a target that holds the sampling error of the cells it was made from.
""",
    "size": """## 2,000 populations x 2,000 genes

`python -m hilbertcell.analyses.size_benchmark`. About 40,000 simulated cells; a fit, and 500 draws of the populations of
as many new batches, each step in a process of its own.
""",
    "twin": """## One program in NumPyro and in Pyro (`bodenmiller_bcrxl_cytof`)

`make bench-twin`. Five donors fitted by variational inference in both libraries, from the same start, with four seeds each; the
sixth predicted from its controls. Seconds are those of inference on the CPU, compilation included. The ELBO of every fit is
evaluated in both libraries. The last columns compare predicted means (root mean square over populations and markers, in sds)
and sds (mean ratio) of the sixth donor with those of the first row. Two sets of 500 draws of one fit differ by 0.06 sds by
chance alone; fits that end near each other by less, as draws share their seed. Beyond that, what seeds of one library differ
by is what two libraries may differ by. What the twin is: [page](models/pyro_twin.md).
""",
    "streaming": """## A million cells against merely reading them

`make bench-streaming`. The one pass over the cells that a fit needs (`data.moments.stream_moments`).
""",
}
PARTS = tuple(SECTIONS)
BY_HAND = {"streaming", "twin"}  # with commands of their own, outside of `make bench`
TIMES = "times.json"  # of the sections, beside the parts
_MADE_BY = {"bodenmiller_plain": "bodenmiller", "bodenmiller_few_shot": "bodenmiller"}


def assemble(docs: Path) -> str:
    """The page from the parts found in `docs/_parts`; a part that is missing is said to be missing."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpyro", "numpy"))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}"
    page = [HEAD.format(machine=machine)]
    record = docs / "_parts" / TIMES
    times = json.loads(record.read_text()) if record.exists() else {}
    for name, words in SECTIONS.items():
        part = docs / "_parts" / f"{name}.md"
        page += [words, part.read_text() if part.exists() else "*Not run.*\n"]
        if made := times.get(_MADE_BY.get(name, name)):
            page.append(
                f"Made on {made['date']} in {made['seconds'] / 60:.1f} min, load {made['load']} before.\n"
            )
        elif part.exists() and name != "streaming":  # which says it itself
            made_on = time.strftime("%Y-%m-%d %H:%M", time.localtime(part.stat().st_mtime))
            page.append(f"Made by itself on {made_on}.\n")
    return "\n".join(page)


def take_grid(grid: Path, docs: Path) -> None:
    """Copy table and figure of `hilbertcell benchmark --config ... --out GRID` to where the page looks for them."""
    for source, target in (("table.md", "_parts/grid.md"), ("figure.png", "images/benchmark.png")):
        shutil.copyfile(grid / source, docs / target)


def main() -> None:
    """Take over a grid if one is given, and write the page."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.benchmark_page", description=__doc__)
    parser.add_argument("--grid", type=Path, help="folder that `hilbertcell benchmark --config` wrote")
    options = parser.parse_args()
    folder = Path("docs")
    if options.grid is not None:
        take_grid(options.grid, folder)
    (folder / "benchmarks.md").write_text(assemble(folder))


if __name__ == "__main__":
    main()
