"""One page that shows predicted responses and how far to trust them, from the draws file and, if given, its scores."""

import json
from pathlib import Path
from typing import Any

import jinja2
import xarray as xr

from hilbertcell.analyses import plots
from hilbertcell.analyses import report_first_screen as first_screen
from hilbertcell.analyses import report_sections as sections
from hilbertcell.analyses.calibration_plots import HeldOut
from hilbertcell.analyses.report_calibration import calibration
from hilbertcell.analyses.shift_summary import INTERVAL, shift_table, summarise_shifts
from hilbertcell.data.validation import DataError

MAX_TABLE_ROWS = 1000


def report(draws: xr.DataTree, path: str | Path, scores: dict[str, Any] | Path | None = None) -> None:
    """Write one self-contained HTML page: figures and script inside, nothing loaded from elsewhere.

    Args:
        draws: what `Fit.predict` returns, or a file of it read back; sections whose group is absent say so.
        path: where the page is written; an existing file is replaced.
        scores: what `evaluate` returned for these draws, or the JSON file of it: how they fared in hidden batches.

    Raises:
        KeyError: there is no group `predictions`.
        DataError: the scores are of other draws, or no scores.

    """
    summary = summarise_shifts(draws)
    words = plots.words(draws)
    held_out = None if scores is None else _held_out(draws, scores)
    table = shift_table(draws, summary, MAX_TABLE_ROWS)
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        words=words,
        units=plots.units(draws),
        unit_in_words=first_screen.unit_in_words(draws),
        batches=first_screen.batch_names(summary, words),
        perturbations=first_screen.listing(summary["perturbation"].values),
        in_short=first_screen.in_short(draws, summary, words, held_out),
        tiles=first_screen.tiles(draws, summary, held_out),
        overview=first_screen.overview(draws, summary),
        notices=first_screen.notices(draws, summary, words),
        data=_data_summary(draws, words),
        sections=[
            calibration(draws, words, held_out),
            sections.panels(draws, summary, words),
            sections.posteriors(draws, summary),
            sections.decomposition(draws),
            sections.batches(draws, words),
            sections.microenvironments(draws, words),
            sections.widths(draws, summary, words),
        ],
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


def _held_out(draws: xr.DataTree, scores: dict[str, Any] | Path) -> HeldOut:
    """The scores of the predicted law, after a look whether they are of these draws."""
    try:
        found = json.loads(scores.read_text(encoding="utf-8")) if isinstance(scores, Path) else scores
        law, targets, number = found["law"]["models"]["prediction"], found["targets"], found["num_draws"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"scores: not what hilbertcell evaluate writes ({error!r})") from None
    strangers = sorted(set(targets) - set(draws["predictions"]["population"].values.astype(str)))
    mine = draws["predictions"].sizes["chain"] * draws["predictions"].sizes["draw"]
    if strangers or number != mine:
        what = (
            f"they score {strangers[0]!r}, which these do not predict"
            if strangers
            else f"{number} draws, not {mine}"
        )
        raise DataError(f"scores: of other draws ({what}); run hilbertcell evaluate on this file of draws")
    return law


def _law(draws: xr.DataTree) -> str:
    """The response law of the fit, and why it is that one."""
    name, reason = draws.attrs.get("law", "unknown"), draws.attrs.get("law_reason", "as set")
    return f"{name} ({reason})"


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
