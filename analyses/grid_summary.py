"""From the stored cells of a benchmark to one comparison per (data set, split), a tidy table and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hilbertcell.analyses.benchmark import MODEL, concatenate_laws
from hilbertcell.analyses.bounds import BOUNDS
from hilbertcell.analyses.cell_summary import summarise_cells
from hilbertcell.analyses.fraud_table import fraud_rows, summarise_frauds
from hilbertcell.analyses.grid_store import law_scores, unit_scores
from hilbertcell.analyses.law_summary import NULL, summarise_law

SCORES = {
    "crps": "CRPS",
    "energy": "energy score",
    "energy_distance": "energy distance",
    "precision_at_N": "DE precision",
}  # those on which the suite must not lose, with their titles
BETWEEN = (16, 64, 4096)  # of the sizes that are stored, those in the table
COLOURS = {"loses": "#c62828", "undecided": "#757575", "wins": "#2e7d32"}
LETTERS = {"loses": "L", "undecided": "u", "wins": "W"}


def summarise_grid(cells: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One comparison per (data set, split), in the order of the cells: `law` and `cells` as the summaries of a benchmark.

    Scores of a batch are means over its targets in all seeds and folds. A model that lacks a fold that others have is left
    out of that comparison, and named in `incomplete`.
    """
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        rows.setdefault((cell["data_set"], cell["split"]), []).append(cell)
    return [_compare(*place, own, seed) for place, own in rows.items()]


def _compare(data_set: str, split: str, cells: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    places = sorted({(cell["seed"], cell["fold"]) for cell in cells})
    found = {(cell["model"], cell["seed"], cell["fold"]): cell for cell in cells}
    complete = [m for m in models if all((m, *place) in found for place in places)]
    result: dict[str, Any] = {
        "data_set": data_set,
        "split": split,
        "folds": len(places),
        "incomplete": [m for m in models if m not in complete],
        "seconds": {
            m: round(sum(found[m, *place].get("seconds", 0.0) for place in places), 2) for m in complete
        },
    }
    laws, labels = [], []
    for place in places:
        records = {m: found[m, *place]["law"] for m in complete if "law" in found[m, *place]}
        read = {m: law_scores(record) for m, record in records.items()}
        if read:
            laws.append({m: scores for m, (scores, _) in read.items()})
            labels.append(next(iter(read.values()))[1])
    if laws:
        result["law"] = summarise_law(concatenate_laws(laws), pd.concat(labels), seed, BOUNDS)
    if frauds := summarise_frauds(cells, MODEL):
        result["frauds"] = frauds
    units = {
        m: [unit_scores(found[m, *place]["cells"]) for place in places if "cells" in found[m, *place]]
        for m in complete
    }
    tables = {m: pd.concat([table for table, _ in parts]) for m, parts in units.items() if parts}
    # the halves of the ceiling leave fewer units; they are averaged over the batches that have some
    full = {m: table for m, table in tables.items() if m not in BOUNDS}
    if full:
        batch = pd.concat([batch for _, batch in units[next(iter(full))]])
        result["cells"] = summarise_cells(full, batch, seed)
        for m in set(tables) - set(full):
            own = pd.concat([batch for _, batch in units[m]])
            result["cells"]["models"] |= summarise_cells({m: tables[m]}, own, seed, bounds=BOUNDS)["models"]
    return result


def tidy(cells: Iterable[Mapping[str, Any]]) -> xr.Dataset:
    """A row per (cell of the table, target): where it belongs, and every score as a variable (nan where it has none).

    Scores of laws in units of `score_targets`, those of cells under `cells_`. Strings stand in variables along `row`.
    """
    frames = []
    for cell in cells:
        place = {name: cell[name] for name in ("data_set", "split", "seed", "fold", "model")}
        parts = []
        if "law" in cell:
            scores, labels = law_scores(cell["law"])
            parts.append(scores.targets.assign(batch=labels["batch"]))
        if "cells" in cell:
            table, batch = unit_scores(cell["cells"])
            table = table.add_prefix("cells_")
            parts.append(table if parts else table.assign(batch=batch))
        if parts:
            frame = pd.concat(parts, axis=1).rename_axis("target").reset_index()
            frames.append(frame.assign(**place))
    everything = pd.concat(frames, ignore_index=True).rename_axis("row")
    text = ["data_set", "split", "model", "target", "batch"]
    columns = {
        name: ("row", everything[name].to_numpy(dtype=object if name in text else None))
        for name in everything
    }
    return xr.Dataset(columns, coords={"row": np.arange(len(everything))})


def outcome_against(row: Mapping[str, Any], score: str, model: str, baseline: str) -> str | None:
    """Verdict of a model against a baseline on one of `SCORES`, or None where there is none."""
    kind = "law" if score in ("crps", "energy") else "cells"
    verdicts = row.get(kind, {}).get("models", {}).get(model, {}).get("verdicts", {})
    return verdicts.get(score, {}).get(baseline, {}).get("outcome")


def losses(rows: Iterable[Mapping[str, Any]], model: str = MODEL) -> list[str]:
    """Every verdict 'loses' of the model, in words: 'data set, split: score against baseline'."""
    return [
        f"{row['data_set']}, {row['split']}: {title} against {other}"
        for row in rows
        for score, title in SCORES.items()
        for other in _models(row)
        if outcome_against(row, score, model, other) == "loses"
    ]


def grid_markdown(rows: Sequence[Mapping[str, Any]], failed: Sequence[str] = ()) -> str:
    """The tables of all comparisons, the losses of the suite first.

    Under "against it" stands how hilbertcell does against the row: CRPS, energy score, energy distance, DE precision, each
    wins (W), undecided (u) or loses (L); without hilbertcell, how the row does against the null.
    """
    lost = losses(rows)
    text = []
    if any(MODEL in _models(row) for row in rows):
        text.append(
            f"Rows that {MODEL} loses: "
            + ("; ".join(_coloured("loses", words) for words in lost) if lost else "nowhere.")
            + "\n"
        )
    if failed:
        text.append("Failed, and not in the tables: " + "; ".join(failed) + "\n")
    for row in rows:
        law = row.get("law", {})
        batches = law.get("batches") or row["cells"]["batches"]
        text.append(
            f"### `{row['data_set']}`, {row['split']}\n\n{row['folds']} folds, {len(batches)} batches, "
            f"{law.get('num_targets', 0)} laws, {row.get('cells', {}).get('num_units', 0)} units of cells.\n"
        )
        if row["incomplete"]:
            text.append(f"Left out, since folds are missing: {', '.join(row['incomplete'])}.\n")
        text.append(_markdown(_rows(row)))
        if "frauds" in row:
            text.append(f"Frauds planted in {MODEL}; bold: moved by two standard errors over batches.\n")
            text.append(_markdown(fraud_rows(row["frauds"])))
    return "\n".join(text)


def _rows(row: Mapping[str, Any]) -> pd.DataFrame:
    subject = MODEL if MODEL in _models(row) else None
    table = {}
    for name in _models(row):
        law = row.get("law", {}).get("models", {}).get(name)
        cells = row.get("cells", {}).get("models", {}).get(name)
        mean = law["mean"] if law else {}
        relative = law["relative_to_null"] if law else {}
        conformal = law["conformal"] if law else {}
        unit = cells["mean"] if cells else {}
        pair = (subject, name) if subject else (name, NULL)
        table[f"**{name}**" if name == subject else name] = {
            "CRPS x null": _ratio(relative.get("crps")),
            "excess x null": _ratio(relative.get("excess")),
            "energy score x null": _ratio(relative.get("energy")),
            "cover of 90 %": _text(mean.get("covered_90"), 2),
            "width": _text(mean.get("width_90")),
            "80 %: cover, widened by": (
                f"{_text(mean.get('covered_80'), 2)} → {_text(conformal.get('cover'), 2)}, x "
                f"{_text(conformal.get('factor'), 2)}"
            )
            if law
            else "-",
            "Pearson": _text(unit.get("pearson"), 2),
            "energy distance": _text(unit.get("energy_distance")),
            "DE precision": _text(unit.get("precision_at_N"), 2),
            "within": _text(unit.get("within_variance_ratio"), 2),
            "populations x training cells": _ratio(
                cells["relative_to_training_cells"].get("population_energy") if cells else None
            ),
            f"between x true at {' / '.join(map(str, BETWEEN))}": _between(unit),
            "worst group, CRPS": (
                f"{law['worst_group']['group'].replace('|', '/')}: {_text(law['worst_group']['crps'])}"
                if law
                else "-"
            ),
            "against it" if subject else "against the null": " ".join(
                _coloured(found, LETTERS[found]) if (found := outcome_against(row, score, *pair)) else "·"
                for score in SCORES
            ),
        }
    return pd.DataFrame.from_dict(table, orient="index")


def _between(unit: Mapping[str, float]) -> str:
    """Variance between generated populations of so many cells, over that of the truth about the centre of the law."""
    true = unit.get("between_true")
    if true is None or not true > 0:
        return "-"
    found = [unit[f"between_{m}"] for m in BETWEEN]
    return " / ".join(_text(None if value is None else value / true, 2) for value in found)


def _models(row: Mapping[str, Any]) -> list[str]:
    """Models of a comparison: the suite's first, then as in its laws, then those that make cells only."""
    names = [*row.get("law", {}).get("models", {}), *row.get("cells", {}).get("models", {})]
    return sorted(dict.fromkeys(names), key=lambda name: (name != MODEL, name in BOUNDS))


def _coloured(outcome: str, words: str) -> str:
    return f'<span style="color:{COLOURS[outcome]}">{words}</span>'


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None or not _known(ratio["ratio"]):
        return "-"
    return f"{_text(ratio['ratio'])} ± {_text(ratio['standard_error'])}"


def _text(value: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if _known(value) else "-"


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _markdown(table: pd.DataFrame) -> str:
    lines = [["model", *table.columns], ["---"] * (table.shape[1] + 1)]
    lines += [[str(name), *map(str, values)] for name, *values in table.itertuples()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
