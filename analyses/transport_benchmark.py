"""Decoders from means to cells, given the true means: `python -m hilbertcell.analyses.transport_benchmark`.

Every decoder gets the same control cells and the same target means; a second, disjoint half of the controls is the
reference for differential expression of decoded and true cells alike. Writes docs/_parts/count_transport.md.
"""

import argparse
import time
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
from hilbertcell.analyses.metrics import energy_distance, within_variance_ratio
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import COUNTS_PER, Populations, natural_scale
from hilbertcell.models.count_transport import transport_counts
from hilbertcell.models.expression_state import ExpressionState, fit_expression_state

NUM_PERTURBATIONS = 10
NUM_INDUCED = 20  # most induced genes, whose correlations are averaged
FALSE_DISCOVERY_RATE = 0.05
TRUE_MEANS = "means of the true cells"
MEAN_EFFECTS = "source means + mean effects"


@dataclass(frozen=True, eq=False)
class Task:
    """Controls to decode from (n cells) and the true cells (n, G), natural scale; reference controls; the target."""

    counts: sparse.csr_array
    library: np.ndarray
    state: ExpressionState
    library_ratio: float
    truth: np.ndarray
    reference: np.ndarray
    all_controls: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """The controls to decode from, natural scale (n, G)."""
        return natural_scale(self.counts, "counts", self.library)

    def target(self, kind: str) -> np.ndarray:
        """Target means (G,): those of the true cells, or the observed mean effects added to the means of the source."""
        if kind == TRUE_MEANS:
            return self.truth.mean(0)
        return self.source.mean(0) + self.truth.mean(0) - self.all_controls.mean(0)


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
    low, high = np.full((2, len(target)), -25.0)
    high[:] = 0.0
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


DECODERS: dict[str, Callable[[Task, np.ndarray, np.random.Generator], np.ndarray]] = {
    "no change": no_change,
    "add the log-mean shift, clip at 0": shift_and_clip,
    "independent negative binomial": independent_counts,
    "count transport": count_transport,
}


def make_task(populations: Populations, controls: np.ndarray, perturbed: np.ndarray, seed: int) -> Task:
    """Equally many controls and perturbed cells (positions), from one half of the controls; the other is the reference."""
    rng = np.random.default_rng(seed)
    assert populations.library_size is not None  # the benchmark is about counts
    controls, half = rng.permutation(controls), len(controls) // 2
    number = min(len(perturbed), half)
    perturbed = np.sort(rng.choice(perturbed, number, replace=False))
    source, reference = np.sort(controls[:number]), np.sort(controls[half:])

    def natural(cells: np.ndarray) -> np.ndarray:
        assert populations.library_size is not None
        return natural_scale(populations.read_cells(cells), "counts", populations.library_size[cells])

    counts, library = sparse.csr_array(populations.read_cells(source)), populations.library_size[source]
    ratio = np.log(populations.library_size[perturbed]).mean() - np.log(library).mean()
    return Task(
        counts,
        library,
        fit_expression_state(counts, library),
        float(np.exp(ratio)),
        natural(perturbed),
        natural(reference),
        natural(np.sort(controls)),
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
    """One row of texts per decoder: means over units and `seeds` choices of the cells."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in DECODERS}
    for _, controls, perturbed in track(
        populations_and_controls, kind, console=Console(stderr=True), transient=True
    ):
        for seed in range(seeds):
            task = make_task(populations, controls, perturbed, seed)
            for name, decode in DECODERS.items():
                rows[name].append(score(task, decode(task, task.target(kind), np.random.default_rng(seed))))
    return pd.DataFrame({name: _summary(pd.DataFrame(found)) for name, found in rows.items()}).T


def _summary(units: pd.DataFrame) -> dict[str, str]:
    either = (units["called"] + units["true"] - units["both"]).clip(lower=1)
    some = units["called"] > 0
    precision = (units["both"] / units["called"].clip(lower=1))[some].mean() if some.any() else np.nan
    total = units.sum()
    mean = units.mean()
    return {
        "DE genes called (true)": f"{mean['called']:.1f} ({mean['true']:.1f})",
        "DE overlap": f"{(units['both'] / either).mean():.3f}",
        "DE precision": f"{precision:.3f}",
        "... of all calls": f"{total['both'] / total['called']:.3f}" if total["called"] else "nan",
        "LFC Spearman": f"{mean['lfc']:.3f}",
        "energy distance": f"{mean['energy']:.4f}",
        "zero-fraction error": f"{mean['zeros']:.4f}",
        "within-variance ratio": f"{mean['variance']:.3f}",
        "correlation of induced genes (true)": f"{mean['correlation']:.3f} ({mean['true_correlation']:.3f})",
    }


def simulated_counts(
    num_cells: int, num_genes: int, density: float, fold: np.ndarray, seed: int
) -> sparse.csr_array:
    """Gamma-Poisson counts of three kinds of cells, shares times `fold` (G,), with that share of non-zero counts."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    share = world.gamma(0.5, size=num_genes) + 0.002
    kinds = share * np.exp(0.5 * world.normal(size=(3, num_genes))) * fold
    kinds /= kinds.sum(1, keepdims=True)
    low, high = 10.0, 1e5
    for _ in range(30):
        depth = np.sqrt(low * high)
        low, high = (depth, high) if (1 - np.exp(-depth * kinds)).mean() < density else (low, depth)
    blocks = []
    for first in range(0, num_cells, 1000):
        n = min(1000, num_cells - first)
        rates = depth * rng.lognormal(0, 0.3, (n, 1)) * kinds[rng.integers(0, 3, n)]
        blocks.append(
            sparse.csr_array(rng.poisson(rates * rng.gamma(2.0, 0.5, rates.shape)).astype(np.float32))
        )
    return sparse.csr_array(sparse.vstack(blocks))


def speed(num_cells: int, num_genes: int = 2000, density: float = 0.1, repeats: int = 5) -> dict[str, str]:
    """Cells per second at targets where all genes change (log sd 0.1, the first 40 by log sd 1); best of `repeats`."""
    rng = np.random.default_rng(1)
    fold = np.exp(rng.normal(0, np.where(np.arange(num_genes) < 40, 1.0, 0.1)))
    counts = simulated_counts(num_cells, num_genes, density, np.ones(num_genes), 1)
    truth = simulated_counts(min(num_cells, 4000), num_genes, density, fold, 2)
    library, true_library = (np.asarray(y.sum(1), dtype=np.float64) for y in (counts, truth))
    target = natural_scale(truth, "counts", true_library).mean(0)
    start = time.perf_counter()
    state = fit_expression_state(counts, library)
    fitted = time.perf_counter() - start
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        transport_counts(counts, library, target, 1.0, np.random.default_rng(2), state)
        taken.append(time.perf_counter() - start)
    density = counts.nnz / np.prod(counts.shape)
    return {
        "genes": f"{num_genes:,}",
        "density": f"{density:.3f}",
        "counts per cell": f"{library.mean():.0f}",
        "cells/s, rates known": f"{num_cells / min(taken):,.0f}",
        "cells/s, rates fitted": f"{num_cells / (min(taken) + fitted):,.0f}",
    }


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
    parts = [
        (
            f"The {len(chosen)} perturbations with the largest mean effects ({', '.join(name for name, *_ in chosen)}), "
            f"Wilcoxon at a false discovery rate of 5 %, {options.seeds} choices of cells each. Source and reference "
            "controls are disjoint. 'DE overlap' is called and true over called or true, both it and the precision are means over "
            f"perturbations, null ones included. The energy distance has no bias for independent samples, and is below 0 "
            "where the target holds the sampling error of the very cells it is compared with. Induced genes are the "
            f"{NUM_INDUCED} with the largest shift.\n"
        ),
    ]
    for kind in (TRUE_MEANS, MEAN_EFFECTS):
        parts.append(f"Target: {kind}.\n\n{markdown(table(knockouts, chosen, kind, options.seeds))}")
    pairs = list(units(interferon))
    parts.append(
        f"The same in `kang_ifnb_wide`, {len(pairs)} populations of one cell type and donor, where interferon induces genes "
        f"that controls hardly express. Target: {TRUE_MEANS}.\n\n"
        f"{markdown(table(interferon, pairs, TRUE_MEANS, options.seeds))}"
    )
    measured = pd.DataFrame({f"{n:,} cells": speed(n) for n in (1000, 10_000)}).T
    parts.append(
        "Speed on simulated counts when all genes change, best of five. Rates of the cells are fitted once for all targets "
        f"of the same controls.\n\n{markdown(measured).replace('| model |', '| |', 1)}"
    )
    text = "\n".join(parts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "count_transport.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
