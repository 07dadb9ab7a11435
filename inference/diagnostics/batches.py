"""Is the table of populations what its labels say? Copies, exchanged labels, and a batch unlike all others.

Populations of one kind (the controls of a context, or one condition) are compared between batches.
Everything here looks at measured means and their sampling noise, and not at the fit.
"""

import numpy as np

from hilbertcell.inference.diagnostics.result import Result, judged, monte_carlo_p

SHARED = 0.5  # share of cells in common that is still put down to chance
_PERMUTATIONS = 999
_NULL_DRAWS = 20_000


def nearest_distance(
    means: np.ndarray, noise_variance: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over features of squared differences per noise variance, for pairs (N, 2) of rows of means (..., P, D).

    Returns the smallest over pairs (...) and which pair that is. Independent cells of one law give 1 on average.
    """
    first, second = pairs.T
    weight = 1.0 / ((noise_variance[first] + noise_variance[second]) * means.shape[-1])
    distance = np.stack(
        [
            np.einsum("...d,...d,d->...", gap, gap, w)
            for gap, w in (
                (means[..., i, :] - means[..., j, :], w)
                for i, j, w in zip(first, second, weight, strict=True)
            )
        ],
        axis=-1,
    )
    return distance.min(-1), distance.argmin(-1)


def copied_cells(
    means: np.ndarray, noise_variance: np.ndarray, pairs: np.ndarray, noise: np.ndarray, names: list[str]
) -> Result:
    """Are the same cells there twice? Smallest distance between two populations that should share no cell.

    Null: no two populations share more than half of their cells. The level is reached where they share just half and batches
    do not differ, which is when populations come closest; two samples of one law stay far below it, even where small and
    skewed populations have not quite the noise that is reckoned with.

    Args:
        means: (P, D) observed means.
        noise_variance: (P, D) of their sampling noise.
        pairs: (N, 2) rows to be compared: the same kind, other batches.
        noise: (R, P, D) draws of the sampling noise, correlated between features as in the cells.
        names: of the populations (P,).
    """
    if not len(pairs):
        return Result(float("nan"), None, "ok")
    found, which = nearest_distance(means, noise_variance, pairs)
    null, _ = nearest_distance(np.sqrt(SHARED) * noise, noise_variance, pairs)
    i, j = pairs[int(which)]
    p = monte_carlo_p(float(found), null, "less")
    return judged(float(found), p, f"{names[i]} and {names[j]}" if p < 0.05 else "")


def batch_labels(
    residual: np.ndarray, kind: np.ndarray, batch: np.ndarray, rng: np.random.Generator
) -> Result:
    """Do populations of one batch have something in common? Here the fault is the null: labels that mean nothing.

    Statistic: mean product of the residuals of two kinds of one batch, per feature. Null: labels of batches are exchanged at
    random within each kind; then the check says "ok" with probability 5 %. A screen whose batches do not differ fails it,
    too: the labels are then of no use.

    Args:
        residual: (P, D) means minus the average of their kind, in units of their sampling noise.
        kind: (P,) int.
        batch: (P,) int.
        rng: exchanges the labels.
    """
    place = np.unique(batch, return_inverse=True)[1]
    num = place.max() + 1
    rows = [np.flatnonzero(kind == k) for k in np.unique(kind)]
    own = float((residual**2).sum())

    def coherence(labels: np.ndarray) -> float:
        sums = np.zeros((num, residual.shape[1]))
        np.add.at(sums, labels, residual)
        return float((sums**2).sum()) - own

    def exchanged() -> np.ndarray:
        labels = place.copy()
        for some in rows:
            labels[some] = rng.permutation(place[some])
        return labels

    counts = np.bincount(place)
    products = float((counts * (counts - 1)).sum()) * residual.shape[1]
    if products == 0:
        return Result(float("nan"), None, "watch")
    found = coherence(place)
    p = monte_carlo_p(found, np.array([coherence(exchanged()) for _ in range(_PERMUTATIONS)]))
    return Result(found / products, p, "ok" if p < 0.05 else "alarm")


def response_slopes(response: np.ndarray, present: np.ndarray) -> np.ndarray:
    """How strongly each batch responds: slope of its responses on the mean ones of the other batches; 1 if alike.

    Args:
        response: (..., B, E, D) perturbed minus control means of E conditions.
        present: (B, E) whether the batch has both.

    Returns:
        (..., B), nan where a batch shares no condition with another.
    """
    weight = present[..., None].astype(float)
    response = np.where(weight > 0, response, 0.0)
    others = weight.sum(0) - weight
    mean = (response.sum(-3, keepdims=True) - response) / np.maximum(others, 1.0)
    used = weight * (others > 0)
    square = (used * mean**2).sum((-2, -1))
    return (used * response * mean).sum((-2, -1)) / np.where(square > 0, square, np.nan)


def outlying_batch(values: np.ndarray, names: list[str], rng: np.random.Generator) -> Result:
    """Does one batch stand out? Largest distance from the mean over batches, in sds of all values (B,), one a batch.

    Grubbs (1950): null: values of one normal law, simulated. Below four batches nothing can stand out.
    """
    known = np.isfinite(values)
    if known.sum() < 4 or np.ptp(values[known]) == 0:
        return Result(float("nan"), None, "ok")

    def grubbs(x: np.ndarray) -> np.ndarray:
        return np.abs(x - x.mean(-1, keepdims=True)).max(-1) / x.std(-1, ddof=1)

    own = values[known]
    null = grubbs(rng.standard_normal((_NULL_DRAWS, len(own))))
    p = monte_carlo_p(float(grubbs(own)), null)
    far = int(np.abs(own - own.mean()).argmax())
    details = {name: float(value) for name, value in zip(names, values, strict=True)}
    return judged(own[far], p, str(np.array(names)[known][far]) if p < 0.05 else "", details)
