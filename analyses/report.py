"""One page that shows predicted responses and how far to trust them, from the draws file alone."""

import io
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from hilbertcell.analyses import plots
from hilbertcell.analyses.shift_summary import (
    INTERVAL,
    Condition,
    conditions,
    has,
    populations_of,
    shift_table,
    summarise_shifts,
)

MAX_PANELS = 12
MAX_TABLE_ROWS = 1000
FEW_CONTROLS = 20
# Intervals that hold this share of the measured means are said to be about right; 400 correlated means say no more.
COVERAGE_BAND = (0.84, 0.96)


@dataclass(frozen=True)
class _Figure:
    svg: Markup
    caption: str

    @classmethod
    def of(cls, name: str, figure: Figure, alt: str, caption: str) -> "_Figure":
        return cls(inline_svg(figure, alt, name), caption)


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    lead: str
    figures: list[_Figure] = field(default_factory=list)
    absent: str = ""


def report(draws: xr.DataTree, path: str | Path) -> None:
    """Write one self-contained HTML page: figures and script inside, nothing loaded from elsewhere.

    Args:
        draws: what `Fit.predict` returns, or a file of it read back; sections whose group is absent say so.
        path: where the page is written; an existing file is replaced.

    Raises:
        KeyError: there is no group `predictions`.

    """
    summary = summarise_shifts(draws)
    words = plots.words(draws)
    panels, left_out = _choose_panels(summary)
    table = shift_table(draws, summary, MAX_TABLE_ROWS)
    sections = [
        _decomposition(draws),
        _microenvironments(draws, words),
        _panels(draws, summary, panels, left_out, words),
        _trust(draws),
        _widths(draws, summary, words),
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        words=words,
        units=plots.units(draws),
        batches=_listing(summary["batch"].values),
        perturbations=_listing(summary["perturbation"].values),
        tiles=_tiles(draws, summary),
        overview=_overview(draws, summary),
        notices=_notices(draws, summary, words),
        data=_data_summary(draws, words),
        sections=sections,
        table=table.to_dict("records"),
        has_dose="dose" in table,
        num_left_out=int(summary["shift"].size - len(table)),
        interval=round(100 * INTERVAL),
        version=draws.attrs.get("hilbertcell_version", "unknown"),
        seed=draws.attrs.get("seed", "unknown"),
        law=_law(draws),
        num_draws=int(draws["predictions"].sizes["draw"] * draws["predictions"].sizes["chain"]),
    )
    Path(path).write_text(page, encoding="utf-8")


def _law(draws: xr.DataTree) -> str:
    """The response law of the fit, and why it is that one."""
    name, reason = draws.attrs.get("law", "unknown"), draws.attrs.get("law_reason", "as set")
    return f"{name} ({reason})"


def inline_svg(figure: Figure, alt: str, name: str) -> Markup:
    """A figure as an <svg> element for an HTML page, with `alt` as its text alternative.

    Text stays text. `name` must be unique on the page: it keeps the ids of figures apart.
    """
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser brings the glyphs that matplotlib's own font lacks: text stays text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows the namespaces of inline SVG
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    head = f'<svg role="img" aria-label="{escape(alt)}" '
    return Markup(svg.replace("<svg ", head, 1))


def _listing(names: np.ndarray, most: int = 6) -> str:
    """Names in order, the tail counted."""
    unique = list(dict.fromkeys(str(name) for name in names))
    if len(unique) <= most:
        return ", ".join(unique[:-1]) + " and " + unique[-1] if len(unique) > 1 else "".join(unique)
    return f"{', '.join(unique[:most])} and {len(unique) - most} more"


def _data_summary(draws: xr.DataTree, words: dict[str, str]) -> dict[str, str]:
    """What the fit was trained on, row by row; empty when the draws do not say."""
    if "constant_data" not in draws.children or "data_summary" not in draws["constant_data"].attrs:
        return {}
    data = json.loads(draws["constant_data"].attrs["data_summary"])
    rows = {
        "cells": f"{data.get('num_cells', 0):,}",
        "populations": f"{data.get('num_populations', 0):,}",
        f"batches ({words['batch']})": f"{data.get('num_batches', 0):,}",
        f"contexts ({words['context']})": ", ".join(map(str, data.get("contexts", []))),
        f"perturbations ({words['perturbation']})": ", ".join(map(str, data.get("perturbations", []))),
        "control": words["control"],
        "genes": f"{draws['predictions'].sizes['gene']:,}",
        "scale": plots.units(draws),
    }
    if data.get("held_out"):
        rows["populations hidden from training"] = f"{len(data['held_out']):,}"
    return rows


def _tiles(draws: xr.DataTree, summary: xr.Dataset) -> list[dict[str, str]]:
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
            "label": f"typical uncertainty of a response ({plots.units(draws)})",
        },
    ]
    if _can_check(draws):
        share, number = plots.coverage(draws)
        verdict = "about right"
        if not COVERAGE_BAND[0] <= share <= COVERAGE_BAND[1]:
            verdict = "too narrow" if share < COVERAGE_BAND[0] else "cautious"
        text = f"of {number} means of training populations lie in their 90 % interval: {verdict}"
        tiles.append(
            {"value": f"{100 * share:.0f} %", "label": text, "kind": "bad" if verdict == "too narrow" else ""}
        )
    return tiles


def _notices(draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str]) -> list[str]:
    """Warnings that came with the draws, and what the draws themselves give reason to warn of."""
    notices: list[str] = []
    broken = int((~np.isfinite(summary["shift"])).any("gene").sum())
    if broken:
        notices.append(f"{broken} populations have draws that are not finite: do not use them; fit again")
    if _can_check(draws):
        share, _ = plots.coverage(draws)
        if share < COVERAGE_BAND[0]:
            notices.append(
                f"intervals are too narrow: {100 * share:.0f} % instead of 90 % of the measured training means lie inside"
            )
    if "constant_data" in draws.children:
        constant = draws["constant_data"].dataset
        number = constant["control_n"].values
        if (number == 0).any():
            notices.append(
                f"{(number == 0).sum()} predicted populations have no {words['control']} cells of their own"
            )
        few = (number > 0) & (number < FEW_CONTROLS)
        if few.any():
            notices.append(
                f"{few.sum()} predicted populations have fewer than {FEW_CONTROLS} {words['control']} cells"
            )
        unseen = constant["training_num_batches"].values == 0
        if unseen.any():
            notices.append(
                f"{unseen.sum()} predicted populations are of a condition that training never saw: extrapolated"
            )
        seen = constant["target_observed"].values.astype(bool)
        if seen.any():
            notices.append(
                f"{seen.sum()} predicted populations were themselves seen: they are no test of prediction"
            )
        notices += [str(text) for text in json.loads(constant.attrs.get("warnings", "[]"))]
    return notices


def _overview(draws: xr.DataTree, summary: xr.Dataset) -> _Figure:
    leading = [c.label for c in conditions(summary)[:3]]
    alt = (
        f"Dot plot of predicted shifts of the leading genes by condition; strongest in {', '.join(leading)}."
    )
    caption = (
        "Each dot is the predicted change of a gene, averaged over the predicted batches: orange up, purple down. Large dots: "
        "the direction is clear in every batch. Small dots: no change is still possible."
    )
    return _Figure.of("overview", plots.shift_overview(draws, summary), alt, caption)


def _decomposition(draws: xr.DataTree) -> _Section:
    lead = "What the measured responses (perturbed minus control) of the training populations are made of."
    section = _Section("variance", "Where responses come from", lead)
    if not has(draws, "constant_data", "variance_decomposition"):
        return _absent(section, "constant_data: variance_decomposition")
    shares = draws["constant_data"]["variance_decomposition"].to_series()
    percents = {str(name): f"{100 * value:.0f} %" for name, value in shares.items()}
    alt = "Bars: " + ", ".join(f"{name} {value}" for name, value in percents.items())
    section.figures.append(_Figure.of("variance", plots.variance_decomposition(draws), alt, ""))
    return section


def _microenvironments(draws: xr.DataTree, words: dict[str, str]) -> _Section:
    lead = (
        f"Every {words['batch']} has hidden conditions of its own (health, handling, plate) that move many genes together. "
        "They are inferred from its control cells, and its perturbed ones where these were measured; close positions mean "
        "alike conditions. A factor whose intervals all hold zero explains nothing."
    )
    section = _Section("microenvironment", f"The microenvironment of each {words['batch']}", lead)
    if not has(draws, "posterior", "microenvironment"):
        return _absent(section, "posterior: microenvironment")
    u = draws["posterior"]["microenvironment"]
    shown = min(u.sizes["batch"], plots.MAX_BATCH_ROWS), min(u.sizes["factor"], plots.MAX_FACTORS)
    alt = f"Posterior mean and 90 % interval of {shown[1]} hidden factors for {shown[0]} batches."
    caption = "Grey: batches of the training. Orange: batches predicted for, from what the file gave of them."
    for axis, number in zip(("batch", "factor"), shown, strict=True):
        if number < u.sizes[axis]:
            caption += (
                f" {u.sizes[axis] - number} more {'batches' if axis == 'batch' else 'factors'} are not shown."
            )
    section.figures.append(_Figure.of("microenvironment", plots.microenvironments(draws), alt, caption))
    return section


def _choose_panels(summary: xr.Dataset) -> tuple[list[Condition], int]:
    ranked = conditions(summary)
    return ranked[:MAX_PANELS], max(len(ranked) - MAX_PANELS, 0)


def _panels(
    draws: xr.DataTree, summary: xr.Dataset, panels: list[Condition], left_out: int, words: dict[str, str]
) -> _Section:
    lead = (
        f"Predicted mean of the perturbed minus the mean of the {words['control']} cells of the same {words['batch']}, for the "
        "genes that stand furthest from zero. Lines are 90 % intervals; grey bars show the mean of the training batches and "
        "how much these differ from one another. A line that crosses zero leaves the direction open. "
        "As the furthest of many genes are shown, a few lines just beside zero are expected even where nothing happens."
    )
    if left_out:
        lead += (
            f" The {len(panels)} conditions with the strongest evidence are shown, {left_out} are left out."
        )
    section = _Section("shifts", "Predicted responses", lead)
    limits = plots.forest_limits(summary, panels)
    for i, condition in enumerate(panels):
        number = len(populations_of(summary, condition))
        alt = f"Predicted shifts with 90 % intervals of the leading genes for {condition.label}, {number} batches."
        more = number - len(plots.BATCH_COLOURS)
        caption = f"{more} more batches are in the file." if more > 0 else ""
        figure = plots.shift_forest(draws, condition, summary, limits)
        section.figures.append(_Figure.of(f"shift{i}", figure, alt, caption))
    return section


def _can_check(draws: xr.DataTree) -> bool:
    return has(draws, "posterior_predictive", "population_mean") and has(
        draws, "observed_data", "population_mean"
    )


def _trust(draws: xr.DataTree) -> _Section:
    lead = (
        "Training populations, predicted from the control cells of their batch and compared with what was measured. This can "
        "reveal a bad fit; the proof of a good one are donors that training never saw (hilbertcell evaluate)."
    )
    section = _Section("trust", "Do the intervals keep their promise?", lead)
    if not _can_check(draws):
        return _absent(section, "posterior_predictive and observed_data: population_mean")
    share, number = plots.coverage(draws)
    section.figures.append(
        _Figure.of(
            "pit",
            plots.predictive_pit(draws),
            f"PIT plot of {number} measured means; {100 * share:.0f} % lie inside their 90 % interval.",
            "PIT: if the predicted laws are right, the line stays near zero. A line that first falls and then rises above "
            "zero means intervals that are too wide, first above and then below too narrow, all on one side a bias. Orange points: "
            "departures that chance does not explain.",
        )
    )
    section.figures.append(
        _Figure.of(
            "ppc",
            plots.predictive_distribution(draws),
            f"Distribution of {number} standardised population means, measured and drawn.",
            "Blue: populations drawn from the program. Black: measured ones. They should lie together.",
        )
    )
    return section


def _widths(draws: xr.DataTree, summary: xr.Dataset, words: dict[str, str]) -> _Section:
    lead = f"What more {words['control']} cells of the same {words['batch']} would buy."
    section = _Section("width", "How wide, and why", lead)
    if not has(draws, "constant_data", "control_n"):
        return _absent(section, "constant_data: control_n")
    alt = "Width of the 90 % interval of each predicted mean against its number of control cells."
    caption = (
        "Each dot is a predicted population (median over genes). The grey line is what the sampling noise of its controls "
        "alone would give: dots far above it are uncertain because batches differ, and more cells would help little."
    )
    section.figures.append(_Figure.of("width", plots.width_by_controls(draws, summary), alt, caption))
    return section


def _absent(section: _Section, what: str) -> _Section:
    text = f"Not shown: these draws hold no {what}."
    return _Section(section.anchor, section.title, section.lead, [], text)
