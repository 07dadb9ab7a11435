"""Decoders from means to cells, given the true means: `python -m hilbertcell.analyses.transport_benchmark`.

Every decoder gets the same control cells and the same target means; a second, disjoint half of the controls is the
reference for differential expression of decoded and true cells alike. What a target holds of the true cells, and of
the sampling error of controls, decides how many genes can be called rightly at all: so there are several targets, and
real perturbed cells beside. Writes docs/_parts/count_transport.md and .json.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from scipy import sparse
from scipy.stats import poisson, spearmanr

from hilbertcell.analyses.differential_expression import benjamini_hochberg, rank_sum
from hilbertcell.analyses.first_benchmarks import data_folder, kang, markdown
from hilbertcell.analyses.law_summary import jsonable
from hilbertcell.analyses.metrics import energy_distance, within_variance_ratio
from hilbertcell.analyses.transport_speed import speed
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import COUNTS_PER, Populations, natural_scale
from hilbertcell.models.count_transport import transport_counts
from hilbertcell.models.expression_state import ExpressionState, fit_expression_state

NUM_PERTURBATIONS = 10
NUM_INDUCED = 20  # most induced genes, whose correlations are averaged
FALSE_DISCOVERY_RATE = 0.05
MANY_CELLS = 100  # perturbations with fewer have hardly a gene that can be called
TRUE_MEANS = "means of the true cells"
SOURCE_EFFECTS = "source means + mean effects"
CONTROL_EFFECTS = "control means + mean effects"
OTHERS = " of other cells"
# what each target holds, and is reported for
WORDS = {
    TRUE_MEANS: "Means of the true cells: they hold the sampling error of these very cells, which flatters every decoder.",
    SOURCE_EFFECTS: (
        "Source means + mean effects (true cells less all controls): the sampling error of the source is added to that of the "
        "true cells, so more genes pass a test than for real cells."
    ),
    CONTROL_EFFECTS: (
        "Control means + mean effects: the same, with the mean of all controls given to the decoder (half of them) in place "
        "of the source's own; predicted means rest on all given controls in the same way."
    ),
    SOURCE_EFFECTS + OTHERS: (
        "Source means + mean effects of other cells: perturbed cells are cut in two, one half gives the effect, the other is the "
        "truth. The strictest: nothing of the true cells is known. Fewer true cells, hence fewer true genes."
    ),
    CONTROL_EFFECTS + OTHERS: (
        "Control means + mean effects of other cells: the same with the means of the given controls. The other cells as "
        "they are show what is reachable with real cells."
    ),
}


@dataclass(frozen=True, eq=False)
class Task:
    """Controls to decode from (n cells) and the true cells (n, G), natural scale; reference controls; the target.

    `perturbed` and `perturbed_library`: counts of the cells that the effect was measured on, the true or other ones.
    """

    counts: sparse.csr_array
    library: np.ndarray
    state: ExpressionState
    library_ratio: float
    truth: np.ndarray
    reference: np.ndarray
    given_mean: np.ndarray
    all_mean: np.ndarray
    perturbed: sparse.csr_array
    perturbed_library: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """The controls to decode from, natural scale (n, G)."""
        return natural_scale(self.counts, "counts", self.library)

    def target(self, kind: str) -> np.ndarray:
        """Target means (G,), see WORDS."""
        if kind == TRUE_MEANS:
            return self.truth.mean(0)
        effect = natural_scale(self.perturbed, "counts", self.perturbed_library).mean(0) - self.all_mean
        return effect + (self.source.mean(0) if kind.startswith(SOURCE_EFFECTS) else self.given_mean)


def no_change(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The controls themselves."""
    return task.source


def shift_and_clip(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The shift of the log mean added to every cell, clipped at 0."""
    source = task.source
    return np.maximum(source + target - source.mean(0), 0.0)


def independent_counts(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Negative binomial counts, independent but for library sizes, with the controls' dispersions and the target means."""
    library = np.rint(task.library * task.library_ratio)
    gamma = rng.gamma(task.state.shape, size=(len(library), len(target))) / task.state.shape
    level = rng.random(gamma.shape)
    low, high = np.full(len(target), -25.0), np.zeros(len(target))
    for _ in range(20):  # bisection of the log share of the gene, all randomness fixed
        share = (low + high) / 2
        cells = np.log1p(
            COUNTS_PER * poisson.ppf(level, library[:, None] * np.exp(share) * gamma) / library[:, None]
        )
        below = cells.mean(0) < target
        low, high = np.where(below, share, low), np.where(below, high, share)
    return cells


def count_transport(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """This project's decoder."""
    moved = transport_counts(task.counts, task.library, target, task.library_ratio, rng, task.state)
    return natural_scale(moved[0], "counts", moved[1])


def perturbed_moved(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The perturbed cells themselves, brought to the target means: what the best of decoders could make of the target."""
    moved = transport_counts(task.perturbed, task.perturbed_library, target, 1.0, rng)
    return natural_scale(moved[0], "counts", moved[1])


def other_perturbed(task: Task, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other perturbed cells as they are: no decoder."""
    return natural_scale(task.perturbed, "counts", task.perturbed_library)


type Decoder = Callable[[Task, np.ndarray, np.random.Generator], np.ndarray]

DECODERS: dict[str, Decoder] = {
    "no change": no_change,
    "add the log-mean shift, clip at 0": shift_and_clip,
    "independent negative binomial": independent_counts,
    "count transport": count_transport,
    "ceiling: the perturbed cells, brought to the target": perturbed_moved,
}
CEILING: dict[str, Decoder] = {"ceiling: other perturbed cells as they are": other_perturbed}


def make_task(
    populations: Populations,
    controls: np.ndarray,
    perturbed: np.ndarray,
    seed: int,
    *,
    other_cells: bool = False,
) -> Task:
    """Equally many controls and perturbed cells (positions), from one half of the controls; the other is the reference.

    With `other_cells` the perturbed cells are cut in two: one half is the truth, effects are those of the other.
    """
    rng = np.random.default_rng(seed)
    assert populations.library_size is not None  # the benchmark is about counts
    library_size = populations.library_size
    controls, half = rng.permutation(controls), len(controls) // 2
    shuffled = rng.permutation(perturbed)
    number = min(len(perturbed) // 2 if other_cells else len(perturbed), half)
    truth, effect = (
        np.sort(shuffled[:number]),
        np.sort(shuffled[number : 2 * number] if other_cells else shuffled[:number]),
    )
    source, reference = np.sort(controls[:number]), np.sort(controls[half:])

    def natural(cells: np.ndarray) -> np.ndarray:
        return natural_scale(populations.read_cells(cells), "counts", library_size[cells])

    counts, library = sparse.csr_array(populations.read_cells(source)), library_size[source]
    return Task(
        counts,
        library,
        fit_expression_state(counts, library),
        float(np.exp(np.log(library_size[effect]).mean() - np.log(library).mean())),
        natural(truth),
        natural(reference),
        natural(np.sort(controls[:half])).mean(0),
        natural(np.sort(controls)).mean(0),
        sparse.csr_array(populations.read_cells(effect)),
        library_size[effect],
    )


def strongest(populations: Populations, number: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Perturbations with the largest squared mean shift, its noise taken off, all batches together: (name, controls, cells)."""
    labels = populations.labels
    cells = {
        name: np.flatnonzero(
            np.isin(populations.cell_population, np.flatnonzero(labels["perturbation"] == name))
        )
        for name in labels["perturbation"].unique()
    }
    control = populations.keys.control
    x = np.concatenate([chunk for _, chunk in populations.chunks()])
    size = {}
    for name, rows in cells.items():
        noise = x[rows].var(0) / len(rows) + x[cells[control]].var(0) / len(cells[control])
        size[name] = (np.square(x[rows].mean(0) - x[cells[control]].mean(0)) - noise).sum()
    for name in sorted(set(cells) - {control}, key=lambda name: -size[name])[:number]:
        yield name, cells[control], cells[name]


def units(populations: Populations) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Perturbed populations of 20 cells or more with 40 controls or more of their context and batch."""
    labels = populations.labels
    for name, row in labels[~labels["is_control"]].iterrows():
        same = (
            (labels["context"] == row["context"]) & (labels["batch"] == row["batch"]) & labels["is_control"]
        )
        if row["num_cells"] >= 20 and (labels.loc[same, "num_cells"] >= 40).any():
            yield str(name), populations.cells_of(str(labels.index[same][0])), populations.cells_of(str(name))


def score(task: Task, cells: np.ndarray) -> dict[str, float]:
    """All columns of the table for decoded cells (n, G), natural scale."""
    true_p, true_shift = rank_sum(task.truth, task.reference)
    p, shift = rank_sum(cells, task.reference)
    true = benjamini_hochberg(true_p) < FALSE_DISCOVERY_RATE
    called = benjamini_hochberg(p) < FALSE_DISCOVERY_RATE
    induced = np.argsort(-true_shift)[:NUM_INDUCED]
    varies = true.sum() > 2 and np.ptp(shift[true]) > 0

    def correlation(x: np.ndarray) -> float:
        x = x[:, induced[(x[:, induced].std(0) > 0)]]
        return float(np.corrcoef(x.T)[np.triu_indices(x.shape[1], 1)].mean())

    return {
        "called": float(called.sum()),
        "true": float(true.sum()),
        "both": float((called & true).sum()),
        "lfc": float(spearmanr(shift[true], true_shift[true]).statistic) if varies else np.nan,
        "energy": energy_distance(cells, task.truth),
        "zeros": float(np.abs((cells == 0).mean(0) - (task.truth == 0).mean(0)).mean()),
        "variance": within_variance_ratio(cells, task.truth),
        "correlation": correlation(cells),
        "true_correlation": correlation(task.truth),
    }


def table(
    populations: Populations,
    populations_and_controls: list[tuple[str, np.ndarray, np.ndarray]],
    kind: str,
    seeds: int,
) -> pd.DataFrame:
    """A row per decoder, unit and choice of the cells (`seeds` of them): columns of `score`, `decoder`, `unit`, `seed`."""
    others = kind.endswith(OTHERS)
    rows = []
    for unit, controls, perturbed in track(
        populations_and_controls, kind, console=Console(stderr=True), transient=True
    ):
        for seed in range(seeds):
            task = make_task(populations, controls, perturbed, seed, other_cells=others)
            target = task.target(kind)
            for name, decode in (DECODERS | CEILING if others else DECODERS).items():
                found = score(task, decode(task, target, np.random.default_rng(seed)))
                rows.append({"decoder": name, "unit": unit, "seed": seed, "cells": len(perturbed)} | found)
    return pd.DataFrame(rows)


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """One row of texts per decoder: means over choices of the cells of what `_summary` says of each, and their spread."""
    texts = {}
    for name, found in rows.groupby("decoder", sort=False):
        values = pd.DataFrame([_summary(one) for _, one in found.groupby("seed")])
        mean, spread = values.mean(), values.std()
        texts[name] = {
            "DE genes called (true)": f"{mean['called']:.1f} ({mean['true']:.1f})",
            "DE overlap": f"{mean['overlap']:.3f} ± {spread['overlap']:.3f}",
            "DE precision": f"{mean['precision']:.3f} ± {spread['precision']:.3f}",
            f"... >= {MANY_CELLS} cells": f"{mean['precision_many']:.3f} ± {spread['precision_many']:.3f}",
            "... of all calls": f"{mean['pooled']:.3f} ± {spread['pooled']:.3f}",
            "LFC Spearman": f"{mean['lfc']:.3f} ± {spread['lfc']:.3f}",
            "energy distance": f"{mean['energy']:.4f}",
            "zero-fraction error": f"{mean['zeros']:.4f} ± {spread['zeros']:.4f}",
            "within-variance ratio": f"{mean['variance']:.3f}",
            "correlation of induced genes (true)": f"{mean['correlation']:.3f} ({mean['true_correlation']:.3f})",
        }
    return pd.DataFrame(texts).T


def _summary(units: pd.DataFrame) -> pd.Series:
    """Means over units; precisions over units with calls, and over all calls."""
    either = (units["called"] + units["true"] - units["both"]).clip(lower=1)
    precision = (units["both"] / units["called"].clip(lower=1))[units["called"] > 0]
    mean = units[
        ["called", "true", "lfc", "energy", "zeros", "variance", "correlation", "true_correlation"]
    ].mean()
    mean["overlap"] = (units["both"] / either).mean()
    mean["precision"] = precision.mean()
    mean["precision_many"] = precision[units["cells"] >= MANY_CELLS].mean()
    mean["pooled"] = units["both"].sum() / units["called"].sum() if units["called"].any() else np.nan
    return mean


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.transport_benchmark", description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder of the real data sets")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    parser.add_argument(
        "--seeds", type=int, default=3, help="choices of source, reference and perturbed cells"
    )
    options = parser.parse_args()
    knockouts = read_populations(
        options.data / "papalexi_eccite_crispr.h5ad",
        perturbation="perturbation",
        control="control",
        context="cell_type",
        batch="replicate",
        library_size="total_counts",
        scale="counts",
    )
    chosen = list(strongest(knockouts, NUM_PERTURBATIONS))
    interferon = kang(options.data)
    words = (
        f"The {len(chosen)} perturbations with the largest mean effects ({', '.join(name for name, *_ in chosen)}); "
        f"means ± standard deviation over {options.seeds} choices of the cells. Source and reference controls are disjoint; "
        "Wilcoxon test, false discovery rate 5 %. DE overlap is the share of called or true genes that are both, DE "
        "precision the share of called ones that are true: means over perturbations, null ones included, over those with "
        f"{MANY_CELLS} cells or more, then over all calls. The energy distance has no bias for independent samples; it is below "
        "0 where the target holds the sampling error of the very cells it is compared with. Induced genes are the "
        f"{NUM_INDUCED} with the largest shift.\n"
    )
    parts = [words]
    results = {}
    for kind, about in WORDS.items():
        rows = table(knockouts, chosen, kind, options.seeds)
        results[f"papalexi_eccite_crispr, {kind}"] = rows
        parts.append(f"{about}\n\n{markdown(summarised(rows))}")
    pairs = list(units(interferon))
    rows = table(interferon, pairs, TRUE_MEANS, options.seeds)
    results[f"kang_ifnb_wide, {TRUE_MEANS}"] = rows
    parts.append(
        f"The same in `kang_ifnb_wide`, {len(pairs)} populations of one cell type and donor, where interferon induces genes "
        f"that controls hardly express. Target: {TRUE_MEANS}.\n\n{markdown(summarised(rows))}"
    )
    measured = pd.DataFrame({f"{n:,} cells": speed(n) for n in (1000, 10_000, 20_000)}).T
    parts.append(
        "Speed on simulated counts of 2,000 genes when all of them change, best of five, on two threads. Rates of the cells are "
        f"fitted once for all targets of the same controls.\n\n{markdown(measured).replace('| model |', '| |', 1)}"
    )
    text = "\n".join(parts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "count_transport.md").write_text(text)
    records = {name: rows.to_dict("records") for name, rows in results.items()} | {
        "speed": measured.to_dict("index")
    }
    (options.out / "count_transport.json").write_text(json.dumps(jsonable(records), indent=1))
    print(text)


if __name__ == "__main__":
    main()
