"""The demo: from a file of cells to a report, each step with the command that does the same.

Whole batches are hidden, predicted from their controls alone, and compared with what was measured in them.
"""

import json
from pathlib import Path

from hilbertcell.analyses.cli_support import KeyOptions, notices, results, whole_output
from hilbertcell.analyses.evaluate import evaluate
from hilbertcell.analyses.inspection import print_summary
from hilbertcell.analyses.report import report
from hilbertcell.analyses.scores_table import print_scores
from hilbertcell.analyses.simulated import simulate
from hilbertcell.data.splits import make_split
from hilbertcell.inference.fit import fit

SIMULATED = KeyOptions(perturbation="perturbation", control="control", context="cell_type", batch="donor")
TARGET_COLUMNS = ["context", "perturbation", "dose", "batch"]


def run_demo(file: Path | None, keys: KeyOptions | None, out: Path) -> None:
    """Run every step on `file` (simulated donors without one) and leave all outputs in the folder `out`."""
    with whole_output(out) as folder:
        folder.mkdir()
        shown = file or out / "cells.h5ad"
        if file is None or keys is None:
            file, keys = folder / "cells.h5ad", SIMULATED
            _say("simulate donors whose hidden microenvironments are known", f"simulate --out {shown}")
            simulate(seed=0).write_h5ad(file, compression="gzip")

        _say("what the file holds", f"inspect {shown} {keys}")
        populations = keys.read(file)
        labels = populations.labels
        print_summary(populations, str(shown), results)

        split = make_split(labels, "unseen_batch", seed=0)
        split.save(folder / "split.json")
        hidden = labels.loc[list(split.held_out)]
        batches = sorted(hidden["batch"].unique())
        _say(
            f"hide the perturbed cells of {', '.join(batches)}, {len(hidden)} populations",
            f"split {shown} {keys} --split unseen_batch --out {out}/split.json",
        )

        rest = labels["batch"].nunique() - len(batches)
        _say(
            f"fit on the other {rest} batches",
            f"fit {shown} {keys} --holdout {out}/split.json --out {out}/fit",
        )
        fitted = fit(populations, holdout=split, seed=0, progress=True)
        fitted.save(folder / "fit")

        known = {perturbation for perturbation, _ in fitted.names.levels}
        targets = hidden[hidden["perturbation"].isin(known) & hidden["context"].isin(fitted.names.contexts)]
        targets[TARGET_COLUMNS].to_csv(folder / "targets.csv", index=False)
        given = populations.select(labels["is_control"] & labels["batch"].isin(batches))
        # Half of the controls are transported: the others are the reference of the tests for changed genes.
        half = max(int(given.labels["num_cells"].min()) // 2, 1)
        _say(
            f"predict the hidden populations from the controls of {', '.join(batches)} alone",
            f"predict {out}/fit {shown} --targets {out}/targets.csv --out {out}/draws.nc"
            f" --cells {out}/predicted.h5ad --cells-per-population {half}",
        )
        draws = fitted.predict(
            given, targets=targets[TARGET_COLUMNS], seed=0, out=folder / "draws.nc", progress=True
        )
        cells = fitted.sample_cells(draws, given, cells_per_population=half, seed=0)
        cells.write_h5ad(folder / "predicted.h5ad", compression="gzip")

        _say(
            "score them against what was measured",
            f"evaluate {out}/draws.nc {shown} --cells {out}/predicted.h5ad --out {out}/scores.json",
        )
        scores = evaluate(draws, populations, cells)
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        print_scores(scores, results)

        _say(
            "write the report",
            f"report {out}/draws.nc --scores {out}/scores.json --out {out}/report.html",
        )
        report(draws, folder / "report.html", folder / "scores.json")
    notices.print(
        f"\n[bold green]Done.[/] Open [bold]{out / 'report.html'}[/] in a browser.", highlight=False
    )


def _say(what: str, command: str) -> None:
    notices.print()
    notices.rule(f"[bold]{what}", align="left")
    notices.print(f"hilbertcell {command}", style="dim", markup=False, highlight=False)
