"""Scores of whole drawn populations: energy score in one feature map, and how far they spread at any number of cells."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hilbertcell.analyses.law_scores import energy_score
from hilbertcell.models.feature_maps import FeatureMap

NUM_POPULATIONS = (
    12  # drawn of each law: scores are fair, so that more of them only lower the Monte Carlo error
)
SIZES = (16, 64, 256, 1024, 4096)  # cells of a generated population
_REPEATS = 8  # samples of each drawn population: their sampling noise is most of the error at 16 cells


@dataclass(frozen=True, eq=False)
class DrawnPopulations:
    """Populations drawn from a law.

    Attributes:
        cells: one array (K, N, G) per target, natural scale: N cells of each of K populations.
        whole: whether these cells are the population, to be sampled from with replacement as often as one likes; else they
            are a sample of it, and N of them are all there are.

    """

    cells: Sequence[np.ndarray]
    whole: bool


def population_energy_score(
    draws: np.ndarray, truth: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> float:
    """Energy score of a law over whole populations: E||m' - m|| - E||m' - m''|| / 2 (mathematics, section 6).

    Args:
        draws: (K, D) mean features of K populations drawn from the law.
        truth: (n, D) features of the observed cells. Their sampling noise N(0, C / n) is added to every draw; nothing
            can be subtracted from a norm.
        weights: (D,) of the features in the norm, which is *unsquared*: with the squared norm of an MMD estimate the
            score would see the mean of the law and nothing of its spread.
        rng: for the noise.

    All models must be scored in one feature map, fitted on training populations.
    """
    n = len(truth)
    root = (truth - truth.mean(0)) / np.sqrt(n * (n - 1))  # root^T root = C / n, for any D
    noisy = draws + rng.standard_normal((len(draws), n)) @ root
    return energy_score(noisy * np.sqrt(weights), truth.mean(0) * np.sqrt(weights))


def spread_by_size(
    drawn: np.ndarray, whole: bool, sizes: Sequence[int], rng: np.random.Generator
) -> dict[int, float]:
    """Variance between generated populations of m cells, sampling noise removed, summed over genes, for each size m.

    `drawn` (K, N, G) and `whole` as in `DrawnPopulations`; nan for sizes beyond N where the cells are a sample. It must not
    depend on m: a model that draws cells one by one from a pool has nothing left once their noise is taken off.
    """
    num_draws, num_cells, _ = drawn.shape
    cells = drawn - drawn.mean((0, 1))
    squared = np.square(cells)
    found = {}
    for m in sizes:
        if whole:
            shape = (num_draws, _REPEATS)
            counts = rng.multinomial(m, np.full(num_cells, 1 / num_cells), size=shape).astype(np.float64)
        elif m <= num_cells:
            counts = np.broadcast_to(np.arange(num_cells) < m, (num_draws, 1, num_cells)).astype(np.float64)
        else:
            found[m] = np.nan
            continue
        mean = counts @ cells / m
        within = (counts @ squared - m * np.square(mean)) / (m - 1)
        found[m] = float((mean.var(0, ddof=1) - within.mean(0) / m).sum(-1).mean())
    return found


def score_populations(
    drawn: DrawnPopulations,
    truth: Sequence[np.ndarray],
    feature_map: FeatureMap,
    unit: np.ndarray,
    names: pd.Index,
    seed: int,
) -> pd.DataFrame:
    """A row per target: `population_energy`, `between_16` ... `between_4096`, and `between_true`.

    `truth` holds the observed cells (n, G) of each target, natural scale; genes are divided by `unit` (G,) for the last
    two. `between_true` is what the spread must be: the squared distance of the true mean from the centre of the law, less
    the noise of both. A single one may be negative: average before dividing.
    """
    rng = np.random.default_rng((seed, 4))
    rows = []
    for populations, cells in zip(drawn.cells, truth, strict=True):
        num_draws = len(populations)
        features = np.stack([feature_map(one).mean(0) for one in populations])
        row = {
            "population_energy": population_energy_score(
                features, feature_map(cells), feature_map.weights, rng
            )
        }
        spread = spread_by_size(populations / unit, drawn.whole, SIZES, rng)
        row |= {f"between_{m}": value for m, value in spread.items()}
        means = populations.mean(1) / unit
        noise = cells.var(0, ddof=1) / unit**2 / len(cells) + means.var(0, ddof=1) / num_draws
        row["between_true"] = float((np.square(cells.mean(0) / unit - means.mean(0)) - noise).sum())
        rows.append(row)
    return pd.DataFrame(rows, index=names)
