"""The first screen of the report: what was predicted, in words and four numbers, and what to beware of."""

import json

import numpy as np
import xarray as xr

from hilbertcell.analyses import plots
from hilbertcell.analyses.calibration_plots import HeldOut, coverage
from hilbertcell.analyses.page_parts import PageFigure
from hilbertcell.analyses.response_plots import shift_overview
from hilbertcell.analyses.shift_summary import Condition, conditions, has, populations_of, top_genes

FEW_CONTROLS = 20
# Intervals that hold this share of the measured means are said to be about right; 400 correlated means say no more.
COVERAGE_BAND = (0.84, 0.96)


def listing(names: np.ndarray, most: int = 6) -> str:
    """Names in order, the tail counted."""
    unique = list(dict.fromkeys(str(name) for name in names))
    if len(unique) <= most:
        return ", ".join(unique[:-1]) + " and " + unique[-1] if len(unique) > 1 else "".join(unique)
    return f"{', '.join(unique[:most])} and {len(unique) - most} more"


def batch_names(summary: xr.Dataset, words: dict[str, str]) -> str:
    """The predicted batches; with the word for them before names that do not hold it."""
    names = summary["batch"].values.astype(str)
    several = len(set(names)) > 1
    word = (
        ""
        if all(words["batch"].lower() in name.lower() for name in names)
        else words["batches" if several else "batch"]
    )
    return f"{word} {listing(names)}".strip()


def can_check(draws: xr.DataTree) -> bool:
    """Whether the draws hold measured training means and what was predicted for them."""
    return has(draws, "posterior_predictive", "population_mean") and has(
        draws, "observed_data", "population_mean"
    )


def verdict(share: float) -> str:
    """What a share of measured means inside their 90 % interval says about the intervals."""
    if share < COVERAGE_BAND[0]:
        return "too narrow"
    return "about right" if share <= COVERAGE_BAND[1] else "cautious"


def in_short(
    draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str], held_out: HeldOut | None
) -> list[str]:
    """The page in three sentences: where most happens, where least, and whether to believe it."""
    ranked = conditions(summary)
    sentences = [_most(draws, summary, ranked[0], words)]
    if len(ranked) > 1:
        label, clear = ranked[-1].label, _clear_everywhere(summary, ranked[-1])
        sentences.append(f"Weakest response: {label}. Clear are {clear} of {summary.sizes['gene']:,} genes.")
    if held_out is not None:
        share = held_out["mean"]["covered_90"]
        sentences.append(
            f"Put to the test in {words['batches']} hidden from training, {100 * share:.0f} % of what was measured lay "
            f"inside the 90 % intervals: these are {verdict(share)}."
        )
    elif can_check(draws):
        share, _ = coverage(draws)
        sentences.append(
            f"These predictions have not been compared with measurements of the same {words['batches']}. In those of the "
            f"training, {100 * share:.0f} % of what was measured lies inside the 90 % intervals: these are "
            f"{verdict(share)}."
        )
    return sentences


def _most(draws: xr.DataTree, summary: xr.Dataset, condition: Condition, words: dict[str, str]) -> str:
    here = summary.isel(population=populations_of(summary, condition))
    gene = here.isel(gene=int(top_genes(here, 1)[0]))
    shift, low, high = float(gene["shift"].mean()), float(gene["lower"].min()), float(gene["upper"].max())
    return (
        f"Strongest response: {condition.label}. {_clear_everywhere(summary, condition)} of {summary.sizes['gene']:,} genes "
        f"change in a clear direction in every {words['batch']}; {gene['gene'].item()} most of all, {'up' if shift > 0 else 'down'} "
        f"by {abs(shift):.2f} {plots.units(draws)} (its 90 % intervals lie between {low:.2f} and {high:.2f})."
    )


def _clear_everywhere(summary: xr.Dataset, condition: Condition) -> int:
    """How many genes change in the same clear direction in all predicted batches."""
    here = summary.isel(population=populations_of(summary, condition))
    return int(((here["lower"] > 0).all("population") | (here["upper"] < 0).all("population")).sum())


def unit_in_words(draws: xr.DataTree) -> str:
    """How to read a number of the page without a pocket calculator."""
    if draws["predictions"].attrs.get("scale", "").startswith("log1p"):
        return (
            "Shifts are differences of natural logarithms: for a gene that is well expressed, +0.7 is a doubling and "
            "-0.7 a halving."
        )
    return ""


def tiles(draws: xr.DataTree, summary: xr.Dataset, held_out: HeldOut | None) -> list[dict[str, str]]:
    """The four numbers of the first screen."""
    half_width = float((summary["upper"] - summary["lower"]).median() / 2)
    clear = float(summary["clear"].mean())
    tiles = [
        {
            "value": f"{summary.sizes['population']:,}",
            "label": f"populations predicted, {summary.sizes['gene']:,} genes each",
        },
        {"value": f"{100 * clear:.0f} %", "label": "of the predicted gene responses have a clear direction"},
        {
            "value": f"± {half_width:.2f}",
            "label": f"typical uncertainty of a response, 90 % interval ({plots.units(draws)})",
        },
    ]
    if held_out is not None:
        share = held_out["mean"]["covered_90"]
        text = f"of what was measured in hidden populations lies in the 90 % intervals: {verdict(share)}"
        tiles.append(
            {
                "value": f"{100 * share:.0f} %",
                "label": text,
                "kind": "bad" if share < COVERAGE_BAND[0] else "",
            }
        )
    elif can_check(draws):
        share, number = coverage(draws)
        text = f"of {number} means of training populations lie in their 90 % interval: {verdict(share)}"
        tiles.append(
            {
                "value": f"{100 * share:.0f} %",
                "label": text,
                "kind": "bad" if share < COVERAGE_BAND[0] else "",
            }
        )
    return tiles


def notices(draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str]) -> list[str]:
    """Warnings that came with the draws, and what the draws themselves give reason to warn of."""
    notices: list[str] = []
    broken = int((~np.isfinite(summary["shift"])).any("gene").sum())
    if broken:
        notices.append(f"{broken} populations have draws that are not finite: do not use them; fit again")
    if can_check(draws):
        share, _ = coverage(draws)
        if share < COVERAGE_BAND[0]:
            notices.append(
                f"intervals are too narrow: {100 * share:.0f} % instead of 90 % of the measured training means lie inside"
            )
    if "constant_data" in draws.children:
        constant = draws["constant_data"].dataset
        number = constant["control_n"].values
        if (number == 0).any():
            notices.append(
                f"{(number == 0).sum()} predicted populations have no {words['control']} cells of their own: "
                "they are drawn from what batches have in common; measure some"
            )
        few = (number > 0) & (number < FEW_CONTROLS)
        if few.any():
            notices.append(
                f"{few.sum()} predicted populations have fewer than {FEW_CONTROLS} {words['control']} cells: "
                "more would narrow their intervals"
            )
        unseen = constant["training_num_batches"].values == 0
        if unseen.any():
            notices.append(
                f"{unseen.sum()} predicted populations are of a condition that training never saw: extrapolated, "
                "and only as good as the likeness of conditions"
            )
        seen = constant["target_observed"].values.astype(bool)
        if seen.any():
            notices.append(
                f"{seen.sum()} predicted populations were themselves seen: they are no test of prediction"
            )
        notices += [str(text) for text in json.loads(constant.attrs.get("warnings", "[]"))]
    return notices


def overview(draws: xr.DataTree, summary: xr.Dataset) -> PageFigure:
    """The dot plot of the leading genes and conditions."""
    leading = [c.label for c in conditions(summary)[:3]]
    alt = (
        f"Dot plot of predicted shifts of the leading genes by condition; strongest in {', '.join(leading)}."
    )
    caption = (
        "Each dot is the predicted change of a gene, averaged over the predicted batches: orange up, purple down. Large dots: "
        "the direction is clear in every batch. Small dots: no change is still possible. "
    )
    return PageFigure.of("overview", shift_overview(draws, summary), alt, caption)
