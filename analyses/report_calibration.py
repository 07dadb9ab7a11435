"""The calibration page of the report: do intervals keep their promise, and in which batches do they not?"""

import numpy as np
import xarray as xr

from hilbertcell.analyses.calibration_curves import (
    checks_of,
    coverage_by_batch,
    coverage_curve,
    ecdf_curve,
    pit,
)
from hilbertcell.analyses.calibration_plots import (
    HeldOut,
    coverage,
    coverage_by_level,
    coverage_of_batches,
    predictive_distribution,
    predictive_pit,
)
from hilbertcell.analyses.page_parts import PageFigure, Section
from hilbertcell.analyses.report_first_screen import can_check
from hilbertcell.analyses.shift_summary import INTERVAL


def calibration(draws: xr.DataTree, words: dict[str, str], held_out: HeldOut | None) -> Section:
    """Coverage by level, PIT, coverage by batch and the predictive check; of hidden populations where scores are given."""
    batch, many = words["batch"], words["batches"]
    lead = (
        "A 90 % interval promises to hold the truth nine times out of ten. Blue: training populations, predicted from the "
        f"control cells of their {batch} and compared with what was measured in them; the fit as a whole has seen them, so this "
        "can reveal a bad fit and cannot prove a good one. "
    )
    lead += (
        f"Orange: populations of {many} hidden from training, compared with what was measured there: the proof."
        if held_out is not None
        else f"The proof are {many} that training never saw. No measurements of the predicted ones were given with these "
        "draws: hide some and score them (hilbertcell evaluate, then report --scores)."
    )
    section = Section("trust", "Do the intervals keep their promise?", lead)
    if not can_check(draws):
        return section.without("posterior_predictive and observed_data: population_mean")
    checks = checks_of(draws)
    values = pit(checks)
    share, number = coverage(draws)
    hidden = (
        "" if held_out is None else f" In hidden populations, {100 * held_out['mean']['covered_90']:.0f} %."
    )
    levels, ecdf = coverage_curve(*values), ecdf_curve(*values)
    section.figures.append(
        PageFigure.of(
            "levels",
            coverage_by_level(draws, held_out),
            f"Coverage by level: of {number} measured training means {100 * share:.0f} % lie inside their 90 % interval; "
            f"the line {_inside(levels.inside)} the band of chance.{hidden}",
            "Below the dashed line intervals are too narrow, above it cautious. Grey: where the whole line of a right "
            "law would run with 95 % probability, genes and populations that err together taken into account.",
        )
    )
    section.figures.append(
        PageFigure.of(
            "pit",
            predictive_pit(draws, held_out),
            f"PIT of {number} measured training means against the uniform law; the line {_inside(ecdf.inside)} the band.",
            "The same by position: above zero, more was measured low in the predicted laws than promised, below zero less. "
            "A line that first rises and then falls below zero: laws too narrow; first falls, then rises: too wide; all on "
            "one side: a bias.",
        )
    )
    if checks.batch is not None:
        names, curve = coverage_by_batch(*values, checks.batch, INTERVAL)
        worst = int(np.argmin(curve.value))
        section.figures.append(
            PageFigure.of(
                "batches",
                coverage_of_batches(draws),
                f"Coverage of 90 % intervals in each of {len(names)} training batches, lowest in {names[worst]} with "
                f"{100 * curve.value[worst]:.0f} % of {curve.x[worst]} means.",
                f"By {batch}, the worst first, with the number of means checked. Grey: what chance allows; orange: outside it.",
            )
        )
    section.figures.append(
        PageFigure.of(
            "ppc",
            predictive_distribution(draws),
            f"Distribution of {number} standardised population means, measured and drawn.",
            "Blue: populations drawn from the program. Black: measured ones. They should lie together.",
        )
    )
    return section


def _inside(inside: bool) -> str:
    return "stays inside" if inside else "leaves"
