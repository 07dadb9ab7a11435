"""The command `diagnose`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hilbertcell.analyses.cli_options import Force, Seed, file, flag, given
from hilbertcell.analyses.cli_support import (
    UsageProblem,
    check_output,
    command,
    existing,
    notices,
    read_file,
    results,
    whole_output,
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    command(app)(diagnose)


def diagnose(
    fit: Annotated[Path, file("FITDIR", "Folder that `fit` wrote.")],
    draws: Annotated[
        Path | None, given("DRAWS.nc", "Predictions of this fit, to be judged on --truth.")
    ] = None,
    truth: Annotated[Path | None, given("FILE", "Cells that hold the predicted populations.")] = None,
    cross_validate: Annotated[
        bool, flag("--cross-validate", "Fit again without each batch in turn: as many fits as batches.")
    ] = False,
    calibrate: Annotated[
        int | None, given("N", "Simulated screens for SBC and TARP; 200 take minutes.", least=50)
    ] = None,
    out: Annotated[
        Path | None, given("PAGE.html", "Also a page, and the same as JSON beside it (PAGE.json).")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Say whether a fit may be believed, in plain words, and what to do where it may not.

    Alarms are findings, not failures: the exit code is 0 whenever the checks have run.
    """
    if (draws is None) != (truth is None):
        raise UsageProblem("--draws are judged on --truth: give both or neither")
    if draws is not None and cross_validate:
        raise UsageProblem("--cross-validate and --draws both judge predictions; ask for one at a time")
    if out is not None:
        if out.suffix == ".json":
            raise UsageProblem(
                f"{out}: the JSON is written beside the page; name the page, as in diagnosis.html"
            )
        check_output(out, force)
        check_output(out.with_suffix(".json"), force)
    from hilbertcell.analyses.diagnose import diagnose as examine
    from hilbertcell.analyses.diagnose_page import print_diagnosis, write_json, write_page
    from hilbertcell.data.draws_io import read_draws
    from hilbertcell.inference.fit import load_fit
    from hilbertcell.inference.perturbdiff.storage import is_perturbdiff

    if is_perturbdiff(existing(fit)):
        raise UsageProblem(
            f"{fit}: is a PerturbDiff fit, which has no law; compare it by `hilbertcell benchmark`"
        )
    fitted = load_fit(fit)
    drawn = None if draws is None else read_draws(existing(draws))
    measured = None if truth is None else read_file(truth, **vars(fitted.keys), require=("perturbed",))
    with notices.status("examining") as status:
        diagnosis = examine(
            fitted, draws=drawn, truth=measured, cross_validate=cross_validate, calibrate=calibrate or 0, seed=seed,
            progress=lambda what: status.update(f"examining: {what}"),
        )  # fmt: skip
    print_diagnosis(diagnosis, results)
    if out is None:
        return
    manifest = _manifest(fit, fitted, seed)
    with whole_output(out) as path:
        write_page(diagnosis, path, manifest)
    with whole_output(out.with_suffix(".json")) as path:
        write_json(diagnosis, path, manifest)
    notices.print(
        f"page written to {out}, numbers to {out.with_suffix('.json')}", highlight=False, markup=False
    )


def _manifest(folder: Path, fit: Any, seed: int) -> dict[str, Any]:
    versions = json.loads((folder / "manifest.json").read_text())["versions"]
    labels = fit.moments.labels
    return {
        "fit": folder.name,
        "batches": labels["batch"].nunique(),
        "populations": len(labels),
        "cells": int(labels["num_cells"].sum()),
        "genes": len(fit.genes),
        "hidden populations": len(fit.held_out),
        "hilbertcell": versions["hilbertcell"],
        "seed": seed,
    }
