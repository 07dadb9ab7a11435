"""Whether a predicted effect resembles its own true effect more than those of other perturbations."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

NORMS = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}


def discrimination(
    predicted: np.ndarray,
    true: np.ndarray,
    genes: Sequence[str] | np.ndarray,
    targets: Sequence[str],
    norm: str = "l1",
) -> np.ndarray:
    """Perturbation discrimination score (T,) of predicted effects (T, G) among the true ones (T, G): 1 best, 0.5 chance.

    `1 - rank / T`, the rank of the own true effect among all of them by distance to the predicted one, from 0. The gene
    that a perturbation targets (the one of its name) is left out of its own distances, or knocking it out would be enough.
    As cell-eval's `discrimination_score_l1`, `_l2`, `_cosine`, but that ties, which those break by the order
    of the rows, share their ranks: a prediction that is the same for all perturbations then scores (T + 1) / 2T.
    Effects are differences of means from the *same* real controls, natural scale; their noise is not corrected, so that
    even the truth from other cells scores below 1. The target genes of the *other* perturbations stay in: a prediction
    that leaves them alone is still told from those by them. Raises: ValueError for an unknown norm or unequal shapes.
    """
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}: is not known; choose one of {', '.join(NORMS)}")
    if predicted.shape != true.shape or predicted.shape != (len(targets), len(genes)):
        raise ValueError(
            f"effects must be two equal (perturbations, genes), got {predicted.shape} and {true.shape} for "
            f"{len(targets)} and {len(genes)}"
        )
    names = np.asarray(genes, dtype=str)
    scores = np.full(len(targets), np.nan)
    for t, target in enumerate(targets):
        kept = names != target
        if norm == "cosine" and not (predicted[t, kept].any() and true[:, kept].any(1).all()):  # no direction
            continue
        distance = cdist(predicted[t : t + 1, kept], true[:, kept], NORMS[norm])[0]
        closer = np.sum(distance < distance[t])
        ties = np.sum(distance == distance[t]) - 1
        scores[t] = 1 - (closer + ties / 2) / len(targets)
    return scores


def count_spearman(called: np.ndarray, true: np.ndarray) -> float:
    """Spearman correlation over perturbations (T,) of the numbers of DE genes called in prediction and truth.

    cell-eval's `de_spearman_sig` ("ES"), over the perturbations with true DE genes; nan where they are fewer than three
    or do not vary. The numbers grow with the number of cells: predict as many as were measured.
    """
    known = true > 0
    if known.sum() < 3 or not np.ptp(called[known]) or not np.ptp(true[known]):
        return float("nan")
    return float(spearmanr(called[known], true[known]).statistic)
