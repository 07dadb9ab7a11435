"""The demo: from a file of cells to a report, each step said as the command one would type.

Whole batches are hidden, predicted from their controls alone, and compared with what was measured in them.
"""

import json
from pathlib import Path

from hilbertcell.analyses.cli_support import KeyOptions, existing, notices, read_file, results, whole_file
from hilbertcell.analyses.evaluate import evaluate
from hilbertcell.analyses.inspection import print_summary
from hilbertcell.analyses.report import report
from hilbertcell.analyses.scores_table import print_scores
from hilbertcell.analyses.simulated import simulate
from hilbertcell.data.draws_io import write_draws
from hilbertcell.data.splits import make_split
from hilbertcell.inference.fit import fit

SIMULATED = KeyOptions(perturbation="perturbation", control="control", context="cell_type", batch="donor")


def run_demo(file: Path | None, keys: KeyOptions | None, folder: Path) -> None:
    """Run every step and leave its output in `folder`, which must exist: cells, split, fit, draws, scores, report."""
    if file is None or keys is None:
        file, keys = folder / "cells.h5ad", SIMULATED
        _say("simulate", "donors whose hidden microenvironments are known")
        simulate(seed=0).write_h5ad(file, compression="gzip")
    _say("inspect", "what the file holds")
    populations = keys.read(file)
    print_summary(populations, str(file), results)

    split = make_split(populations.labels, "unseen_batch", seed=0)
    hidden = populations.labels.loc[list(split.held_out)]
    batches = ", ".join(hidden["batch"].unique())
    _say("split", f"hide all {len(hidden)} perturbed populations of {batches}; their controls stay known")
    split.save(folder / "split.json")

    _say("fit", f"the hidden-factor program on the other {populations.labels['batch'].nunique()
...
