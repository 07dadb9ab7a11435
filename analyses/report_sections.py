"""Sections of the report about responses: what they are made of, what batches add, what is predicted for whom."""

import numpy as np
import xarray as xr

from hilbertcell.analyses import plots
from hilbertcell.analyses.batch_plots import fixed_and_random, one_population_in_every_batch
from hilbertcell.analyses.page_parts import PageFigure, Section
from hilbertcell.analyses.response_plots import (
    forest_limits,
    gene_posteriors,
    shift_forest,
    width_by_controls,
)
from hilbertcell.analyses.shift_summary import conditions, has, populations_of

MAX_PANELS = 12


def decomposition(draws: xr.DataTree) -> Section:
    """Bars of the variance decomposition."""
    lead = "What the measured responses (perturbed minus control) of the training populations are made of."
    section = Section("variance", "Where responses come from", lead)
    if not has(draws, "constant_data", "variance_decomposition"):
        return section.without("constant_data: variance_decomposition")
    shares = draws["constant_data"]["variance_decomposition"].to_series()
    percents = {str(name): f"{100 * value:.0f} %" for name, value in shares.items()}
    alt = "Bars: " + ", ".join(f"{name} {value}" for name, value in percents.items())
    section.figures.append(PageFigure.of("variance", plots.variance_decomposition(draws), alt, ""))
    return section


def microenvironments(draws: xr.DataTree, words: dict[str, str]) -> Section:
    """Positions of all batches on the hidden factors."""
    lead = (
        f"Every {words['batch']} has hidden conditions of its own (health, handling, plate) that move many genes together. "
        "They are inferred from its control cells, and its perturbed ones where these were measured; close positions mean "
        "alike conditions. A factor whose intervals all hold zero explains nothing."
    )
    section = Section("microenvironment", f"The microenvironment of each {words['batch']}", lead)
    if not has(draws, "posterior", "microenvironment"):
        return section.without("posterior: microenvironment")
    u = draws["posterior"]["microenvironment"]
    shown = min(u.sizes["batch"], plots.MAX_BATCH_ROWS), min(u.sizes["factor"], plots.MAX_FACTORS)
    alt = f"Posterior mean and 90 % interval of {shown[1]} hidden factors for {shown[0]} batches."
    caption = "Grey: batches of the training. Orange: batches predicted for, from what the file gave of them."
    for axis, number in zip(("batch", "factor"), shown, strict=True):
        if number < u.sizes[axis]:
            caption += (
                f" {u.sizes[axis] - number} more {'batches' if axis == 'batch' else 'factors'} are not shown."
            )
    section.figures.append(PageFigure.of("microenvironment", plots.microenvironments(draws), alt, caption))
    return section


def batches(draws: xr.DataTree, words: dict[str, str]) -> Section:
    """One population put into every batch: what all share (fixed) and what each adds (random)."""
    batch, many = words["batch"], words["batches"]
    lead = (
        f"A response has a part that all {many} share and a part that comes from the {batch}: its hidden conditions, where its "
        f"untreated cells stand, and what is left of it. Here the same {words['context']} under the same "
        f"{words['perturbation']} is put into every {batch}, whether it was measured there or not."
    )
    section = Section("batches", f"The same cells in every {batch}", lead)
    if not has(draws, "posterior", "batch_response"):
        return section.without("posterior: batch_response")
    posterior = draws["posterior"].dataset
    condition = str(posterior["leading_condition"].values[0])
    names, genes = posterior["batch"].values, posterior["gene_name"].values[0]
    section.figures.append(
        PageFigure.of(
            "population",
            one_population_in_every_batch(draws, condition),
            f"Expected shifts of {', '.join(map(str, genes[:4]))} in {condition}, one row for each of {len(names)} batches, "
            "and the part that all share.",
            f"{condition}, the strongest shared response. Blue: the shared part with its 90 % interval. Grey: {many} of the "
            f"training; orange: {many} predicted for. Crosses: what was measured, cell noise and the peculiarities of that one "
            "population included. Rows far outside the blue stripe are what an average over everybody would get wrong.",
        )
    )
    shared = abs(posterior["fixed_response"].mean(("chain", "draw")))
    own = posterior["batch_response"].isel(batch=np.flatnonzero(posterior["in_training"].values))
    ratio = float((own.std("batch").mean(("chain", "draw")) / shared).median())
    section.figures.append(
        PageFigure.of(
            "fixed",
            fixed_and_random(draws),
            f"Differences between batches against the size of the shared response, {shared.size} gene responses; the median "
            f"difference is {100 * ratio:.0f} % of the shared response.",
            f"Every dot is a gene of one of the {shared.sizes['leading_condition']} strongest responses: right, it responds "
            f"strongly everywhere; high, {many} differ in it. Dashed: differences of 10 % and of 50 % of the shared response.",
        )
    )
    return section


def posteriors(draws: xr.DataTree, summary: xr.Dataset) -> Section:
    """Densities of the leading genes of the strongest condition."""
    condition = conditions(summary)[0]
    lead = (
        f"The predicted responses of {condition.label} as what they are: not numbers but laws. The higher a curve, the more "
        "probable the shift below it; the title says how probable it is that the gene goes that way at all."
    )
    section = Section("genes", "Gene by gene", lead)
    number = min(len(populations_of(summary, condition)), len(plots.BATCH_COLOURS))
    names = summary["batch"].values[populations_of(summary, condition)][:number]
    section.figures.append(
        PageFigure.of(
            "posterior",
            gene_posteriors(draws, condition, summary),
            f"Densities of the predicted shift of the leading genes of {condition.label} in {', '.join(map(str, names))}.",
            "Bars: 90 % intervals, dots: means. Probability of the direction in the least certain batch shown, as the share of "
            "draws on that side of zero.",
        )
    )
    return section


def panels(draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str]) -> Section:
    """Forests of the leading conditions, `MAX_PANELS` of them at most."""
    ranked = conditions(summary)
    shown, left_out = ranked[:MAX_PANELS], max(len(ranked) - MAX_PANELS, 0)
    lead = (
        f"Predicted mean of the perturbed minus the mean of the {words['control']} cells of the same {words['batch']}, for the "
        "genes that stand furthest from zero. Lines are 90 % intervals; grey bars show the mean of the training batches and "
        "how much these differ from one another. A line that crosses zero leaves the direction open. "
        "As the furthest of many genes are shown, a few lines just beside zero are expected even where nothing happens."
    )
    if left_out:
        lead += (
            f" The {len(shown)} conditions with the strongest evidence are shown, {left_out} are left out."
        )
    section = Section("shifts", "Predicted responses", lead)
    limits = forest_limits(summary, shown)
    for i, condition in enumerate(shown):
        number = len(populations_of(summary, condition))
        alt = f"Predicted shifts with 90 % intervals of the leading genes for {condition.label}, {number} batches."
        more = number - len(plots.BATCH_COLOURS)
        caption = f"{more} more batches are in the file." if more > 0 else ""
        figure = shift_forest(draws, condition, summary, limits)
        section.figures.append(PageFigure.of(f"shift{i}", figure, alt, caption))
    return section


def widths(draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str]) -> Section:
    """Interval width against the number of control cells."""
    lead = f"What more {words['control']} cells of the same {words['batch']} would buy."
    section = Section("width", "How wide, and why", lead)
    if not has(draws, "constant_data", "control_n"):
        return section.without("constant_data: control_n")
    alt = "Width of the 90 % interval of each predicted mean against its number of control cells."
    caption = (
        "Each dot is a predicted population (median over genes). The grey line is what the sampling noise of its controls "
        "alone would give: dots far above it are uncertain because batches differ, and more cells would help little; "
        "dots below it borrow from other batches."
    )
    section.figures.append(PageFigure.of("width", width_by_controls(draws, summary), alt, caption))
    return section
